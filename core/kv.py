"""What a block of KV looks like in memory, and the two identities that say who may read whom.

The arena is `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]`: a block is
contiguous, and a tensor-parallel slice of a block is one run because heads are outermost.
"""

from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Literal

from core.ids import LayoutId

KvDtype = Literal["float32", "bfloat16", "float16", "uint8"]
DTYPE_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Shape of one block in one worker's arena.

    `num_kv_heads` counts the heads this worker holds, all of them at `tp_size` 1.
    """

    block_size: int
    num_kv_heads: int
    num_layers: int
    head_dim: int
    dtype: KvDtype
    tp_size: int = 1
    tp_rank: int = 0

    @property
    def block_bytes(self) -> int:
        return (
            self.num_kv_heads
            * self.num_layers
            * 2
            * self.block_size
            * self.head_dim
            * DTYPE_BYTES[self.dtype]
        )

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token."""
        return self.block_bytes // self.block_size

    @property
    def layout_id(self) -> LayoutId:
        """Equal ids copy block for block; different ones need a reshard plan."""
        text = ",".join(f"{k}={v}" for k, v in sorted(asdict(self).items()))
        return LayoutId(blake2b(text.encode(), digest_size=8).hexdigest())

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` occupy, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)
