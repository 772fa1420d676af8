"""The one tensor that holds all KV of a worker, in the layout of core/kv.py."""

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
        self.data = torch.zeros(
            (
                num_blocks,
                layout.num_kv_heads,
                layout.num_layers,
                2,
                layout.block_size,
                layout.head_dim,
            ),
            dtype=TORCH_DTYPE[layout.dtype],
            device=device,
        )

    @property
    def nbytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes

    @property
    def address(self) -> int:
        return self.data.data_ptr()
