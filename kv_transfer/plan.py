"""From block lists to descriptors: which bytes to read from where to where. Pure.

    layouts of owner and reader   once per pair    -> for each owner rank that has heads the reader
                                                      wants: the runs within one block
    pairs of blocks               every read       -> those runs, shifted to each pair and joined

A run is contiguous on both sides. Two runs that can be joined are neighbours in the reader's arena,
and no byte there is written twice; so in the order of the reader's offsets one look at each
neighbour joins all there is to join, and the plan is the shortest there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, reduce
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from core.errors import TransferCause, TransferFailed
from core.ids import BlockId
from core.kv import KvLayout

_FEW_BLOCKS = 256
_FEW_RUNS = 64

Int64s = npt.NDArray[np.int64]
Rows: TypeAlias = npt.NDArray[np.uint64]
Run: TypeAlias = list[int]


@dataclass(slots=True)
class ReadPlan:
    """Contiguous runs to read from one owner shard: byte offset in the owner's arena, byte offset
    in the reader's, bytes. Few of them are a list, as each call of numpy costs some 50 us with the
    cold caches that a hand-off finds.
    """

    runs: list[Run] | Rows
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.runs, list) and len(self.runs) <= _FEW_RUNS:
            self.runs = self.runs.tolist()
        few = self.few
        self.nbytes = int(self.rows[:, 2].sum()) if few is None else sum(run[2] for run in few)

    @property
    def few(self) -> list[Run] | None:
        """The runs, if they are few."""
        return self.runs if isinstance(self.runs, list) else None

    @property
    def rows(self) -> Rows:
        """The runs, `[n, 3]` uint64."""
        if isinstance(self.runs, list):
            return np.array(self.runs, dtype=np.uint64).reshape(-1, 3)
        return self.runs

    @property
    def descriptors(self) -> int:
        return len(self.runs)


@dataclass(frozen=True, slots=True)
class ArenaShape:
    """One rank's arena: how it is laid out, and how many blocks it has."""

    layout: KvLayout
    num_blocks: int


def plan_read(
    owners: Sequence[ArenaShape],
    reader: ArenaShape,
    remote: Sequence[BlockId],
    local: Sequence[BlockId],
) -> dict[int, ReadPlan]:
    """Read block `remote[i]` into block `local[i]`: the plan per shard of the owner, by its index
    in `owners`. Shards the reader needs nothing of have none.

    `owners` are the tensor-parallel ranks of one worker, in any order; a block has the same id on
    all of them. `reader` is one rank. Raises TransferFailed where no plan exists, ValueError for
    local blocks that are not there or are named twice.
    """
    if len(remote) != len(local):
        raise ValueError(f"{len(remote)} remote blocks for {len(local)} local ones")
    shards = _runs_by_shard(tuple(owners), reader)
    if not local:
        return {}
    if len(set(local)) != len(local):
        raise ValueError("a local block is the target of two")
    if min(local) < 0 or max(local) >= reader.num_blocks:
        raise ValueError(f"a local block is not one of {reader.num_blocks}")
    first, last = min(remote), max(remote)
    for index, _ in shards:
        # in a layer-first arena such a block would be another layer's, not past the end
        if first < 0 or last >= owners[index].num_blocks:
            raise TransferFailed(
                f"the KV owner named a block that is not one of its {owners[index].num_blocks}",
                cause=TransferCause.OTHER_PROTOCOL,
            )
    (index, runs), *others = shards
    if runs.whole and not others and len(local) <= _FEW_BLOCKS:
        return {index: ReadPlan(_whole_rows(runs, remote, local))}
    source, target = _in_target_order(remote, local)
    return {index: ReadPlan(_rows(runs, source, target)) for index, runs in shards}


# -- every read -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _BlockRuns:
    """The runs of block 0, ascending in the reader's arena: arrays `[outer, 1, inner]` of bytes.

    `outer` counts what lies outside the block axis at the reader (1 if blocks are outermost), so
    that `[outer, blocks, inner]` is ascending too.
    """

    owner: Int64s
    reader: Int64s
    nbytes: Int64s
    owner_stride: int
    reader_stride: int
    """From one block to the next."""

    whole: bool
    """A block is one run on both sides, and neighbouring blocks are neighbours."""


def _whole_rows(runs: _BlockRuns, remote: Sequence[BlockId], local: Sequence[BlockId]) -> list[Run]:
    """Where a block is one run on both sides, as between equal layouts.

    As `_rows`, for few. Two blocks: 360 us by arrays with cold caches, 80 by this loop.
    """
    owner, reader, block = int(runs.owner[0, 0, 0]), int(runs.reader[0, 0, 0]), runs.reader_stride
    rows: list[Run] = []
    source_next = target_next = -1
    for target, source in sorted(zip(local, remote, strict=True)):
        if source == source_next and target == target_next:
            rows[-1][2] += block
        else:
            rows.append([owner + source * block, reader + target * block, block])
        source_next, target_next = source + 1, target + 1
    return rows


def _in_target_order(remote: Sequence[BlockId], local: Sequence[BlockId]) -> tuple[Int64s, Int64s]:
    source = np.fromiter(remote, np.int64, len(remote))
    target = np.fromiter(local, np.int64, len(local))
    order = np.argsort(target)
    return source[order], target[order]


def _rows(runs: _BlockRuns, source: Int64s, target: Int64s) -> Rows:
    """`[n, 3]` of ReadPlan for all pairs of blocks, `target` ascending."""
    outer, _, inner = runs.nbytes.shape
    cube = np.empty((outer, len(source), inner, 3), dtype=np.int64)
    np.add(runs.owner, source[:, None] * runs.owner_stride, out=cube[..., 0])
    np.add(runs.reader, target[:, None] * runs.reader_stride, out=cube[..., 1])
    cube[..., 2] = runs.nbytes
    return _joined(cube.reshape(-1, 3), inner).view(np.uint64)


def _joined(rows: Int64s, inner: int) -> Int64s:
    """`rows` with neighbours made one; within each `inner` of them there are none."""
    last, first = rows[inner - 1 : -1 : inner], rows[inner::inner]
    ends_owner, ends_reader = last[:, 0] + last[:, 2], last[:, 1] + last[:, 2]
    joins = (ends_owner == first[:, 0]) & (ends_reader == first[:, 1])
    if not joins.any():
        return rows
    begins = np.ones(len(rows), dtype=np.bool_)
    begins[inner::inner] = ~joins
    starts = np.flatnonzero(begins)
    joined = rows[starts]
    joined[:, 2] = np.add.reduceat(rows[:, 2], starts)
    return joined


def _starts(breaks: npt.NDArray[np.bool_]) -> Int64s:
    """Where runs begin, given which element does not continue the one before it."""
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(breaks) + 1])


def _lengths(starts: Int64s, total: int) -> Int64s:
    return np.diff(starts, append=total)


# -- once per pair of layouts -----------------------------------------------------------------


@lru_cache(maxsize=256)
def _runs_by_shard(
    owners: tuple[ArenaShape, ...], reader: ArenaShape
) -> tuple[tuple[int, _BlockRuns], ...]:
    """The shards to read from, and what of a block to read from each."""
    _check(owners, reader)
    return tuple(
        (index, _runs(owners[index], reader, heads))
        for index, heads in _heads_by_shard(owners, reader.layout).items()
    )


def _runs(owner: ArenaShape, reader: ArenaShape, heads: range) -> _BlockRuns:
    source, target = _cells(owner, heads), _cells(reader, heads)
    order = np.argsort(target)
    source, target = source[order], target[order]
    cell = reader.layout.cell_bytes
    starts = _starts((np.diff(source) != cell) | (np.diff(target) != cell))
    nbytes = _lengths(starts, len(target)) * cell
    source, target = source[starts], target[starts]
    stride = reader.layout.strides_bytes(reader.num_blocks)["block"]
    # a run does not leave the block's part of the arena, unless there is no other block
    outer = len(np.unique(target // (stride * reader.num_blocks))) if reader.num_blocks > 1 else 1
    shape = (outer, 1, len(starts) // outer)
    owner_stride = owner.layout.strides_bytes(owner.num_blocks)["block"]
    return _BlockRuns(
        owner=source.reshape(shape),
        reader=target.reshape(shape),
        nbytes=nbytes.reshape(shape),
        owner_stride=owner_stride,
        reader_stride=stride,
        whole=shape == (1, 1, 1) and int(nbytes[0]) == owner_stride == stride,
    )


def _cells(arena: ArenaShape, heads: range) -> Int64s:
    """Byte offsets of block 0's cells, in the order head, layer, side, token."""
    layout = arena.layout
    strides = layout.strides_bytes(arena.num_blocks)
    first = heads.start - layout.heads.start
    offsets = (
        np.arange(first, first + len(heads), dtype=np.int64) * strides["head"],
        np.arange(layout.num_layers, dtype=np.int64) * strides["layer"],
        np.arange(layout.sides, dtype=np.int64) * strides["side"],
        np.arange(layout.block_size, dtype=np.int64) * strides["token"],
    )
    cells: Int64s = reduce(np.add.outer, offsets).ravel()
    return cells


def _heads_by_shard(owners: Sequence[ArenaShape], reader: KvLayout) -> dict[int, range]:
    """Which heads to read from which shard. Readers of the same head spread over its replicas, at
    equal TP each to the rank of its own number."""
    readers_per_head = max(1, reader.tp_size // reader.model_kv_heads)
    place = reader.tp_rank % readers_per_head
    by_rank = sorted(range(len(owners)), key=lambda index: owners[index].layout.tp_rank)
    taken: dict[int, range] = {}
    for head in reader.heads:
        replicas = [index for index in by_rank if head in owners[index].layout.heads]
        if not replicas:
            layout = owners[0].layout
            rank = head * layout.tp_size // layout.model_kv_heads
            raise _no_plan(
                f"its rank {rank} of {layout.tp_size}, which holds KV head {head}, is missing; "
                "it must offer the arenas of all its ranks"
            )
        index = replicas[place * len(replicas) // readers_per_head]
        start = taken[index].start if index in taken else head
        taken[index] = range(start, head + 1)
    return taken


def _check(owners: Sequence[ArenaShape], reader: ArenaShape) -> None:
    if not owners:
        raise _no_plan("it offers no arena; it must offer those of all its ranks")
    for who, arena in (*(("it", owner) for owner in owners), ("this worker", reader)):
        try:
            arena.layout.check()
        except ValueError as error:
            raise _no_plan(f"{who} has a KV layout that cannot be: {error}; mend it") from error
        if arena.num_blocks < 1:
            raise _no_plan(f"{who} has an arena of no blocks; give it KV memory")
    for owner in owners:
        _check_same(owner.layout, reader.layout)
    sizes = {owner.layout.tp_size for owner in owners}
    ranks = {owner.layout.tp_rank for owner in owners}
    if len(sizes) != 1 or len(ranks) != len(owners):
        raise _no_plan("its ranks contradict each other; restart it as one tensor-parallel group")


def _check_same(owner: KvLayout, reader: KvLayout) -> None:
    model = "both must serve one model"
    for what, theirs, ours, remedy in (
        ("block_size", owner.block_size, reader.block_size, "set the same engine.block_size"),
        ("dtype", owner.dtype, reader.dtype, "set the same engine.dtype"),
        ("num_layers", owner.num_layers, reader.num_layers, model),
        ("head_dim", owner.head_dim, reader.head_dim, model),
        ("sides", owner.sides, reader.sides, model),
        ("total KV heads", owner.model_kv_heads, reader.model_kv_heads, model),
    ):
        if theirs != ours:
            raise _no_plan(f"{what} is {theirs} there and {ours} here; {remedy}")


def _no_plan(why: str) -> TransferFailed:
    return TransferFailed(
        f"no plan to read the KV owner's blocks: {why}", cause=TransferCause.NO_PLAN
    )
