from dataclasses import replace

import pytest

from core.kv import KvLayout

LLAMA_8B = KvLayout(block_size=16, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16")


def test_a_block_of_llama_3_8b_has_two_mebibytes() -> None:
    assert LLAMA_8B.block_bytes == 2 * 2**20
    assert LLAMA_8B.token_bytes == 131_072


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 32},
        {"num_kv_heads": 4},
        {"num_layers": 16},
        {"head_dim": 64},
        {"dtype": "float16"},
        {"tp_size": 2},
        {"tp_rank": 1},
    ],
)
def test_any_other_field_is_another_layout(change: dict[str, object]) -> None:
    assert replace(LLAMA_8B, **change).layout_id != LLAMA_8B.layout_id  # type: ignore[arg-type]
    assert replace(LLAMA_8B).layout_id == LLAMA_8B.layout_id


def test_a_partial_block_counts_as_one() -> None:
    assert [LLAMA_8B.num_blocks(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]
