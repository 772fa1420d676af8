"""Workers of several tensor-parallel ranks, as arenas whose every element says what it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from core.ids import BlockId
from core.kv import Axis, KvLayout
from kv_transfer.plan import ArenaShape

Numbers = npt.NDArray[Any]


def ids(numbers: Sequence[int]) -> list[BlockId]:
    return [BlockId(n) for n in numbers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What all ranks of both workers agree on."""

    heads: int = 8
    layers: int = 2
    sides: int = 2
    block_size: int = 4
    head_dim: int = 4

    def layout(self, axes: tuple[Axis, ...], tp_size: int = 1, tp_rank: int = 0) -> KvLayout:
        return KvLayout(
            block_size=self.block_size,
            num_kv_heads=max(1, self.heads // tp_size),
            num_layers=self.layers,
            head_dim=self.head_dim,
            dtype="float32",
            tp_size=tp_size,
            tp_rank=tp_rank,
            total_kv_heads=self.heads,
            sides=self.sides,
            axes=axes,
        )

    def worker(self, axes: tuple[Axis, ...], tp_size: int, num_blocks: int) -> list[ArenaShape]:
        """The arenas of one worker, by rank."""
        return [ArenaShape(self.layout(axes, tp_size, rank), num_blocks) for rank in range(tp_size)]

    def truth(self, num_blocks: int, width: int) -> Numbers:
        """`[block, head of the model, layer, side, token, width]`: another number, from 1, in each
        place."""
        shape = (num_blocks, self.heads, self.layers, self.sides, self.block_size, width)
        return np.arange(1, 1 + int(np.prod(shape))).reshape(shape)


def view(shape: ArenaShape, memory: Numbers) -> Numbers:
    """`memory`, flat, as `[block, head, layer, side, token, rest of the cell]`: a view of it."""
    layout = shape.layout
    extent: dict[Axis, int] = {
        "block": shape.num_blocks,
        "head": layout.num_kv_heads,
        "layer": layout.num_layers,
        "side": layout.sides,
        "token": layout.block_size,
    }
    inside = memory.reshape(*(extent[axis] for axis in layout.axes), -1)
    order = [layout.axes.index(axis) for axis in extent]
    return inside.transpose(*order, len(order))


def held(shape: ArenaShape) -> list[int]:
    """The model's heads in this arena, counted out in the plainest way."""
    layout = shape.layout
    if layout.tp_size >= layout.total_kv_heads:
        return [layout.tp_rank * layout.total_kv_heads // layout.tp_size]
    share = layout.total_kv_heads // layout.tp_size
    return [layout.tp_rank * share + i for i in range(share)]


def fill(shape: ArenaShape, memory: Numbers, truth: Numbers) -> None:
    """Put the truth of the rank's heads into its arena."""
    view(shape, memory)[...] = truth[:, held(shape)]


def wanted(
    reader: ArenaShape,
    before: Numbers,
    truth: Numbers,
    remote: Sequence[BlockId],
    local: Sequence[BlockId],
) -> Numbers:
    """The reader's memory once block `remote[i]` is in `local[i]` and nothing else has changed."""
    after = before.copy()
    here = view(reader, after)
    for there, block in zip(remote, local, strict=True):
        here[block] = truth[there][held(reader)]
    return after
