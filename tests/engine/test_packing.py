"""How a batch is packed: order, positions, groups, and what each group reads."""

from collections.abc import Sequence

import numpy as np
import pytest

from core.ids import BlockId, RequestId, SequenceId
from core.kv import KvLayout
from engine.arena import Arena
from engine.packing import GROUP_TOKENS, SPLIT_BLOCKS, PackedStep
from engine.types import SeqStep

LAYOUT = KvLayout(block_size=4, num_kv_heads=2, num_layers=3, head_dim=8, dtype="float32")


def make_entry(start: int, end: int, table: Sequence[int] | None = None) -> SeqStep:
    blocks = range(LAYOUT.num_blocks(end)) if table is None else table
    return SeqStep(
        sequence_id=SequenceId(RequestId("r")),
        tokens=range(1000, 1000 + end),
        start=start,
        end=end,
        block_table=[BlockId(b) for b in blocks],
        sample=None,
    )


def pack(*entries: SeqStep) -> PackedStep:
    return PackedStep(entries, Arena(LAYOUT, 8))


def test_decodes_come_first_longest_context_first() -> None:
    step = pack(make_entry(0, 3), make_entry(4, 5), make_entry(2, 9), make_entry(7, 8))
    assert step.order == [3, 1, 2, 0]
    assert step.position_ids.tolist() == [[7, 4, *range(2, 9), *range(3)]]
    assert step.input_ids.tolist() == [[1000 + p for p in step.position_ids[0].tolist()]]
    assert step.last_rows.tolist() == [0, 1, 8, 11]
    assert [(g.row, g.queries, len(g.entries)) for g in step.groups] == [
        (0, 1, 2),
        (2, 7, 1),
        (9, 3, 1),
    ]


def test_long_decodes_are_grouped_within_a_factor_of_two() -> None:
    longest = 4 * SPLIT_BLOCKS * LAYOUT.block_size
    lengths = [longest, longest // 2, longest // 2 - 1, longest // 4, 9, 1]
    step = pack(*(make_entry(n - 1, n) for n in lengths))
    assert [[e.end for e in g.entries] for g in step.groups] == [
        lengths[:2],
        lengths[2:4],
        lengths[4:],
    ]


def test_a_group_of_decodes_is_bounded_in_padded_tokens() -> None:
    length = GROUP_TOKENS // 4
    step = pack(*(make_entry(length - 1, length) for _ in range(10)))
    assert [len(group.entries) for group in step.groups] == [4, 4, 2]


def test_rows_written_are_where_the_layout_says() -> None:
    step = pack(make_entry(3, 6, table=[5, 2]))
    index = np.arange(step.arena.data.numel()).reshape(step.arena.data.shape)
    wanted = [
        index[block, head, 0, 0, offset, 0] // LAYOUT.head_dim
        for block, offset in ((5, 3), (2, 0), (2, 1))
        for head in range(2)
    ]
    assert step.write_rows.tolist() == wanted


def test_tiles_read_are_where_the_layout_says() -> None:
    (read,) = pack(make_entry(8, 9, table=[5, 2, 7])).reads(None)
    tile = LAYOUT.block_size * LAYOUT.head_dim
    index = np.arange(8 * LAYOUT.block_bytes // 4).reshape(8, 2, 3, 2, tile)
    wanted = [
        index[block, head, 0, kind, 0] // tile
        for kind in range(2)
        for head in range(2)
        for block in (5, 2, 7)
    ]
    assert read.tiles.tolist() == wanted
    assert (read.key_first, read.key_end, read.mask) == (0, 9, None)


def test_padding_repeats_the_sequences_own_block() -> None:
    step = pack(make_entry(11, 12, table=[1, 2, 3]), make_entry(2, 3, table=[6]))
    (read,) = step.reads(None)
    blocks = read.tiles.view(2, 2, 2, 3) // (LAYOUT.num_kv_heads * LAYOUT.num_layers * 2)
    assert blocks[0, 0, 0].tolist() == [1, 2, 3]
    assert blocks[0, 1, 0].tolist() == [6, 6, 6]
    assert read.mask is not None
    assert read.mask[1, 0, 0].isfinite().tolist() == [True] * 3 + [False] * 9


def test_a_window_reads_only_the_blocks_it_touches() -> None:
    (read,) = pack(make_entry(29, 30, table=range(8))).reads(6)
    # Positions 24 to 29 lie in blocks 6 and 7.
    assert read.tiles.numel() == 2 * 2 * 2
    assert (read.key_first, read.key_end, read.mask) == (0, 6, None)


def test_a_window_longer_than_the_context_costs_no_mask() -> None:
    (read,) = pack(make_entry(0, 8)).reads(8)
    assert read.causal
    assert read.mask is None


def test_reads_are_made_once_per_window() -> None:
    step = pack(make_entry(0, 8))
    assert step.reads(4) is step.reads(4)
    assert step.reads(4) is not step.reads(None)


@pytest.mark.parametrize(
    ("start", "end", "fresh"),
    [(0, 6, [1]), (0, 8, []), (4, 6, [1]), (5, 6, []), (8, 9, [2]), (7, 8, []), (0, 3, [0])],
)
def test_blocks_entered_but_not_filled_are_cleared_first(
    start: int, end: int, fresh: list[int]
) -> None:
    blocks = pack(make_entry(start, end)).fresh_blocks
    assert ([] if blocks is None else blocks.tolist()) == fresh


def test_an_empty_batch_is_a_programmers_mistake() -> None:
    with pytest.raises(ValueError, match="empty batch"):
        pack()
