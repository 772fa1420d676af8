"""A batch of sequences as one packed row of tokens, with every index its attention needs.

    entries    decodes, longest context first          prefill chunks
    rows       | d0 | d1 | d2 | ... |  p0 p0 p0 p0 ... | p1 p1 ... |
    attention  |--- group 0 ---|-- group 1 --|--- group 2 ---|-- group 3 --|

A group is attended in one call: either decodes of similar context (one query row each, padded to
the longest) or one prefill chunk. All indexes are made once per step, and once per distinct sliding
window, never per layer: layers differ by a constant offset into the arena (see attention.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core.ids import BlockId
from core.kv import KvLayout
from engine.arena import Arena
from engine.types import SeqStep

GROUP_TOKENS = 65_536
"""Padded context of one group of decodes, at most: bounds what is gathered at a time."""
SPLIT_BLOCKS = 16
"""Groups whose longest context is below this many blocks are not split: padding is cheaper."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRead:
    """What one group reads under one window, as indexes valid for layer 0.

    `tiles` is `[2 * sequences * num_kv_heads * blocks]` (keys, then values) into the arena seen as
    `[block_size, head_dim]` tiles. Of the gathered positions `[key_first, key_end)` count. `mask`
    is `[sequences, 1, queries, keys]`, 0 or -inf; None where nothing is hidden, or where `causal`
    says that keys are exactly the queries.
    """

    tiles: torch.Tensor
    key_first: int
    key_end: int
    mask: torch.Tensor | None
    causal: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Packed rows [row, row + sequences * queries) of entries attended together."""

    row: int
    queries: int
    entries: tuple[SeqStep, ...]

    @property
    def row_end(self) -> int:
        return self.row + len(self.entries) * self.queries


class PackedStep:
    """One step, packed. `order[i]` is the caller's index of the i-th packed entry.

    `input_ids` and `position_ids` are `[1, T]`; `write_rows` is `[T * num_kv_heads]`, for layer 0's
    keys, into the arena seen as rows of head_dim; `last_rows` maps each packed entry to its last
    row. `arena` is written by the attention of every layer.
    """

    def __init__(self, batch: Sequence[SeqStep], arena: Arena) -> None:
        if not batch:
            raise ValueError("an empty batch has nothing to pack")
        self.arena = arena
        self._device = arena.data.device
        self._reads: dict[int | None, tuple[GroupRead, ...]] = {}
        self.order = sorted(range(len(batch)), key=lambda i: _packing_key(batch[i]))
        entries = [batch[i] for i in self.order]
        self.groups = _group(entries, arena.layout.block_size)

        counts = np.array([entry.end - entry.start for entry in entries], dtype=np.int64)
        ends = np.cumsum(counts)
        self.last_rows = ends - 1
        positions = np.concatenate([np.arange(entry.start, entry.end) for entry in entries])
        ids = np.fromiter(
            (token for entry in entries for token in entry.tokens[entry.start : entry.end]),
            dtype=np.int64,
            count=int(ends[-1]),
        )
        self.input_ids = self._to_device(ids)[None]
        self.position_ids = self._to_device(positions)[None]
        self.write_rows = self._to_device(_write_rows(entries, arena.layout))
        fresh = _fresh_tails(entries, arena.layout.block_size)
        self.fresh_blocks = self._to_device(fresh) if len(fresh) else None

    def reads(self, window: int | None) -> tuple[GroupRead, ...]:
        """One read per group; query at position p sees keys in (p - window, p]."""
        reads = self._reads.get(window)
        if reads is None:
            reads = tuple(self._read(group, window) for group in self.groups)
            self._reads[window] = reads
        return reads

    def _read(self, group: Group, window: int | None) -> GroupRead:
        size = self.arena.layout.block_size
        if window is not None and all(entry.end <= window for entry in group.entries):
            window = None
        firsts = [_first_block(entry, window, size) for entry in group.entries]
        tables = _padded_tables(group.entries, firsts, size)
        starts = np.array([entry.start for entry in group.entries], dtype=np.int64)
        base = np.array(firsts, dtype=np.int64) * size

        # What no query of the group sees at either end is cut off instead of masked: decodes that
        # end at the same gathered position need no mask at all.
        ends = np.array([entry.end for entry in group.entries], dtype=np.int64) - base
        opens = np.zeros_like(base) if window is None else starts - base - window + 1
        key_first, key_end = max(0, int(opens.min())), int(ends.max())
        exact = group.queries == 1 and bool((ends == key_end).all())
        causal = window is None and group.queries > 1 and starts[0] == 0
        queries = starts[:, None] + np.arange(group.queries)
        keys = base[:, None] + np.arange(key_first, key_end)
        return GroupRead(
            tiles=self._to_device(_tiles(tables, self.arena.layout)),
            key_first=key_first,
            key_end=key_end,
            mask=None if exact or causal else self._mask(queries, keys, window),
            causal=bool(causal),
        )

    def _mask(self, queries: IntArray, keys: IntArray, window: int | None) -> torch.Tensor:
        rows = self._to_device(queries.astype(np.int32))
        columns = self._to_device(keys.astype(np.int32))
        distance = rows[:, :, None] - columns[:, None, :]
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, dtype=self.arena.data.dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))[:, None]

    def _to_device(self, array: npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)


def _packing_key(entry: SeqStep) -> tuple[bool, int]:
    is_prefill = entry.end - entry.start > 1
    return is_prefill, -entry.end


def _group(entries: Sequence[SeqStep], block_size: int) -> tuple[Group, ...]:
    groups: list[Group] = []
    row = 0
    pending: list[SeqStep] = []

    def close() -> None:
        nonlocal row, pending
        if pending:
            queries = pending[0].end - pending[0].start
            groups.append(Group(row=row, queries=queries, entries=tuple(pending)))
            row = groups[-1].row_end
            pending = []

    for entry in entries:
        if pending and not _joins(entry, pending, block_size):
            close()
        pending.append(entry)
    close()
    return tuple(groups)


def _joins(entry: SeqStep, pending: Sequence[SeqStep], block_size: int) -> bool:
    """Whether a decode may be padded to the longest (first) of its group."""
    longest = pending[0]
    if entry.end - entry.start > 1 or longest.end - longest.start > 1:
        return False
    similar = 2 * entry.end >= longest.end or longest.end <= SPLIT_BLOCKS * block_size
    return similar and (len(pending) + 1) * longest.end <= GROUP_TOKENS


def _first_block(entry: SeqStep, window: int | None, block_size: int) -> int:
    if window is None:
        return 0
    return max(0, entry.start - window + 1) // block_size


def _padded_tables(entries: Sequence[SeqStep], firsts: Sequence[int], block_size: int) -> IntArray:
    """`[sequences, blocks]`; padding repeats the entry's own first block.

    Its own, because a masked value still enters the sum as 0 * value: a NaN in another sequence's
    block would spread.
    """
    rows: list[Sequence[BlockId]] = [
        entry.block_table[first : -(-entry.end // block_size)]
        for entry, first in zip(entries, firsts, strict=True)
    ]
    width = max(len(row) for row in rows)
    tables = np.empty((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        tables[i, : len(row)] = row
        tables[i, len(row) :] = row[0]
    return tables


def _tiles(tables: IntArray, layout: KvLayout) -> IntArray:
    heads = np.arange(layout.num_kv_heads)
    keys = (tables[:, None, :] * layout.num_kv_heads + heads[:, None]) * layout.num_layers * 2
    return np.concatenate([keys.ravel(), keys.ravel() + 1])


def _write_rows(entries: Sequence[SeqStep], layout: KvLayout) -> IntArray:
    size = layout.block_size
    rows: list[IntArray] = []
    heads = np.arange(layout.num_kv_heads)
    for entry in entries:
        positions = np.arange(entry.start, entry.end)
        first = entry.start // size
        table = np.array(entry.block_table[first : -(-entry.end // size)], dtype=np.int64)
        blocks = table[positions // size - first]
        tiles = (blocks[:, None] * layout.num_kv_heads + heads) * layout.num_layers * 2
        rows.append((tiles * size + (positions % size)[:, None]).ravel())
    return np.concatenate(rows)


def _fresh_tails(entries: Sequence[SeqStep], block_size: int) -> IntArray:
    """Blocks entered by this step and not filled by it.

    They are zeroed first: what an earlier owner left behind could be NaN, and a hidden position
    still enters the sum as 0 * value.
    """
    fresh = [
        entry.block_table[entry.end // block_size]
        for entry in entries
        if entry.end % block_size and entry.start <= entry.end // block_size * block_size
    ]
    return np.array(fresh, dtype=np.int64)
