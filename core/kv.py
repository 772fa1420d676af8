"""What a block of KV looks like in memory.

Baton's arena is `[num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim]`: a block is
contiguous, and a tensor-parallel slice of a block is one run because heads are outermost. Other
engines order the axes otherwise; `axes` says how, and a reshard plan reads across.
"""

from dataclasses import dataclass
from typing import Literal

Axis = Literal["block", "head", "layer", "side", "token"]
BLOCK_FIRST: tuple[Axis, ...] = ("block", "head", "layer", "side", "token")
LAYER_FIRST: tuple[Axis, ...] = ("layer", "side", "block", "token", "head")
"""One tensor per layer, keys before values: the arena of vLLM and its kin."""

KvDtype = Literal["float32", "bfloat16", "float16", "uint8"]
DTYPE_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """Shape of the blocks in the arena of one tensor-parallel rank.

    `num_kv_heads` counts the heads this rank holds. `total_kv_heads` are the model's; with fewer of
    them than ranks, each head is held by `tp_size / total_kv_heads` neighbouring ranks. `sides` is
    2 for keys and values, 1 for one latent vector (MLA). `axes` orders the arena, outermost first;
    `head_dim` is always innermost.
    """

    block_size: int
    num_kv_heads: int
    num_layers: int
    head_dim: int
    dtype: KvDtype
    tp_size: int = 1
    tp_rank: int = 0
    total_kv_heads: int = 0
    """0: `num_kv_heads * tp_size`, no head is held twice."""
    sides: int = 2
    axes: tuple[Axis, ...] = BLOCK_FIRST

    @property
    def cell_bytes(self) -> int:
        """One head's vector of one token, layer and side: contiguous in every layout."""
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token."""
        return self.num_kv_heads * self.num_layers * self.sides * self.cell_bytes

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.token_bytes

    @property
    def model_kv_heads(self) -> int:
        """KV heads of the whole model, over all ranks."""
        return self.total_kv_heads or self.num_kv_heads * self.tp_size

    @property
    def heads(self) -> range:
        """Which of the model's KV heads this rank holds."""
        first = self.tp_rank * self.model_kv_heads // self.tp_size
        return range(first, first + self.num_kv_heads)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` occupy, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def strides_bytes(self, num_blocks: int) -> dict[Axis, int]:
        """Distance of neighbours along each axis, in an arena of `num_blocks`."""
        strides: dict[Axis, int] = {}
        stride = self.cell_bytes
        for axis in reversed(self.axes):
            strides[axis] = stride
            stride *= num_blocks if axis == "block" else self.extent(axis)
        return strides

    def check(self) -> None:
        """Raise ValueError, naming the fields, if no arena can have this layout."""
        sizes = (self.block_size, self.num_kv_heads, self.num_layers, self.head_dim, self.tp_size)
        if min(sizes) < 1 or self.total_kv_heads < 0:
            raise ValueError("a size of the KV layout is not positive")
        if self.dtype not in DTYPE_BYTES or self.sides not in (1, 2):
            raise ValueError(f"no KV has dtype {self.dtype} and {self.sides} sides")
        if sorted(self.axes) != sorted(BLOCK_FIRST):
            raise ValueError(f"axes {','.join(self.axes)} are no order of {','.join(BLOCK_FIRST)}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ValueError(f"tp_rank {self.tp_rank} is not in tp_size {self.tp_size}")
        total = self.model_kv_heads
        if total % self.tp_size and self.tp_size % total:
            raise ValueError(f"{total} KV heads do not divide over tp_size {self.tp_size}")
        if self.num_kv_heads != max(1, total // self.tp_size):
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} is not the share of one of {self.tp_size} ranks "
                f"in {total} KV heads"
            )

    def extent(self, axis: Axis) -> int:
        match axis:
            case "head":
                return self.num_kv_heads
            case "layer":
                return self.num_layers
            case "side":
                return self.sides
            case "token":
                return self.block_size
            case "block":
                raise ValueError("the arena says how many blocks there are")
