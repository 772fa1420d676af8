from dataclasses import replace

import pytest

from core.kv import BLOCK_FIRST, LAYER_FIRST, KvLayout

LLAMA_8B = KvLayout(block_size=16, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16")
MLA = KvLayout(
    block_size=64, num_kv_heads=1, num_layers=61, head_dim=576, dtype="bfloat16", sides=1
)


def rank(tp_rank: int, tp_size: int, total: int) -> KvLayout:
    return replace(
        LLAMA_8B,
        tp_size=tp_size,
        tp_rank=tp_rank,
        num_kv_heads=max(1, total // tp_size),
        total_kv_heads=total,
    )


def test_a_block_of_llama_3_8b_has_two_mebibytes() -> None:
    assert LLAMA_8B.block_bytes == 2 * 2**20
    assert LLAMA_8B.token_bytes == 131_072


def test_a_latent_vector_is_stored_once() -> None:
    assert MLA.token_bytes == 61 * 576 * 2


def test_a_partial_block_counts_as_one() -> None:
    assert [LLAMA_8B.num_blocks(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


def test_ranks_share_the_heads_in_order() -> None:
    assert [list(rank(r, 4, 8).heads) for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_neighbouring_ranks_repeat_a_head_when_heads_are_few() -> None:
    assert [list(rank(r, 8, 2).heads) for r in range(8)] == [[0]] * 4 + [[1]] * 4


def test_strides_follow_the_axes() -> None:
    small = KvLayout(block_size=4, num_kv_heads=2, num_layers=3, head_dim=8, dtype="float16")
    assert small.strides_bytes(10) == {
        "token": 16,
        "side": 64,
        "layer": 128,
        "head": 384,
        "block": 768,
    }
    assert replace(small, axes=LAYER_FIRST).strides_bytes(10) == {
        "head": 16,
        "token": 32,
        "block": 128,
        "side": 1280,
        "layer": 2560,
    }


@pytest.mark.parametrize("axes", [BLOCK_FIRST, LAYER_FIRST])
def test_the_outermost_stride_times_its_extent_is_the_arena(axes: tuple[str, ...]) -> None:
    layout = replace(LLAMA_8B, axes=axes)  # type: ignore[arg-type]
    strides = layout.strides_bytes(10)
    extent = 10 if axes[0] == "block" else layout.num_layers
    assert strides[layout.axes[0]] * extent == 10 * layout.block_bytes


@pytest.mark.parametrize("layout", [LLAMA_8B, MLA, rank(1, 2, 8), rank(7, 8, 2), rank(3, 8, 8)])
def test_layouts_that_can_be_pass(layout: KvLayout) -> None:
    layout.check()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 0}, "not positive"),
        ({"num_layers": 0}, "not positive"),
        ({"tp_size": 0}, "not positive"),
        ({"total_kv_heads": -8}, "not positive"),
        ({"dtype": "int4"}, "dtype int4"),
        ({"sides": 3}, "3 sides"),
        ({"axes": ("block", "head", "layer", "side", "side")}, "axes"),
        ({"tp_rank": 1}, "tp_rank 1 is not in tp_size 1"),
        ({"tp_size": 3, "total_kv_heads": 8}, "8 KV heads do not divide over tp_size 3"),
        ({"tp_size": 8, "total_kv_heads": 3}, "3 KV heads do not divide over tp_size 8"),
        ({"tp_size": 2, "total_kv_heads": 8}, "num_kv_heads 8 is not the share"),
    ],
)
def test_a_layout_that_cannot_be_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(LLAMA_8B, **change).check()  # type: ignore[arg-type]
