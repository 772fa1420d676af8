import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import BlockId
from kv_transfer.plan import Descriptor, plan_read
from tests.builders import QUICK


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(n) for n in numbers]


def test_neighbours_on_both_sides_become_one_read() -> None:
    assert plan_read(ids(3, 4, 5), ids(7, 8, 9), 10) == [Descriptor(30, 70, 30)]


@pytest.mark.parametrize(
    ("remote", "local"), [((3, 5), (7, 8)), ((3, 4), (7, 9)), ((4, 3), (8, 7)), ((3, 3), (7, 8))]
)
def test_a_gap_on_either_side_ends_a_run(remote: tuple[int, int], local: tuple[int, int]) -> None:
    assert plan_read(ids(*remote), ids(*local), 10) == [
        Descriptor(remote[0] * 10, local[0] * 10, 10),
        Descriptor(remote[1] * 10, local[1] * 10, 10),
    ]


def test_nothing_to_read_is_no_descriptor() -> None:
    assert plan_read([], [], 10) == []


def test_lists_of_different_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="2 remote blocks for 1 local"):
        plan_read(ids(1, 2), ids(1), 10)


@QUICK
@given(st.permutations(range(12)), st.permutations(range(12)), st.integers(0, 12))
def test_every_block_lands_in_its_place(remote: list[int], local: list[int], count: int) -> None:
    source, target = [f"block {i}" for i in range(12)], [""] * 12
    for part in plan_read(ids(*remote[:count]), ids(*local[:count]), 1):
        here, there = part.local_offset_bytes, part.remote_offset_bytes
        target[here : here + part.nbytes] = source[there : there + part.nbytes]
    wanted = [""] * 12
    for there, here in zip(remote[:count], local[:count], strict=True):
        wanted[here] = source[there]
    assert target == wanted
