"""The one tensor that holds all KV of a worker, in the layout of core/kv.py."""

import mmap
from contextlib import suppress

import torch

from core.errors import ConfigError
from core.kv import KvDtype, KvLayout

TORCH_DTYPE: dict[KvDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "uint8": torch.uint8,
}


class Arena:
    """`data` is `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]`, contiguous.

    Its address never changes, so a transport registers it once.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: str = "cpu") -> None:
        if num_blocks < 1:
            raise ConfigError(
                f"the KV memory given holds no block: one block needs {layout.block_bytes} bytes"
            )
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (
            num_blocks,
            layout.num_kv_heads,
            layout.num_layers,
            2,
            layout.block_size,
            layout.head_dim,
        )
        dtype = TORCH_DTYPE[layout.dtype]
        if torch.device(device).type == "cpu":
            self.data = _in_huge_pages(self.nbytes).view(dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes

    @property
    def address(self) -> int:
        return self.data.data_ptr()


def _in_huge_pages(nbytes: int) -> torch.Tensor:
    """`[nbytes]` uint8 zeros on the CPU, every page of them there already.

    To touch an arena first, and to read it from another process, costs the kernel work per page, of
    which there are 512 times as many with 4 KiB as with 2 MiB.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {nbytes} bytes for the KV arena: {error}") from error
    with suppress(OSError, AttributeError):  # a kernel, or a platform, without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).zero_()
