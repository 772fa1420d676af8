from hypothesis import given
from hypothesis import strategies as st

from core.ids import WorkerId
from router.policies.rebalance import Waiting, choose_moves
from tests.builders import QUICK

A, B = WorkerId("a"), WorkerId("b")


def waiting(work_s: float, **elsewhere_s: float) -> Waiting:
    return Waiting(
        work_s=work_s, elsewhere_s={WorkerId(name): s for name, s in elsewhere_s.items()}
    )


def moves(queue: list[Waiting], **queue_s: float) -> list[tuple[int, str]]:
    loads = {WorkerId(name): seconds for name, seconds in queue_s.items()}
    return [(move.position, move.to) for move in choose_moves(queue, 1.0, loads, 5.0)]


def test_nobody_moves_while_the_queue_keeps_the_target() -> None:
    assert moves([waiting(2, a=2), waiting(2, a=2)], a=0) == []


def test_who_gains_most_moves_first_and_no_more_than_are_needed() -> None:
    assert moves([waiting(2, a=2), waiting(2, a=2), waiting(2, a=2)], a=0) == [(2, "a")]


def test_nobody_moves_where_the_target_would_break_or_the_wait_be_longer() -> None:
    queue = [waiting(2, a=2), waiting(2, a=2), waiting(2, a=2)]
    assert moves(queue, a=4) == []
    assert moves([waiting(5, a=5)], a=1.5) == []


def test_a_place_filled_by_one_move_is_not_filled_again() -> None:
    queue = [waiting(2, a=3), waiting(2, a=3), waiting(9, a=3)]
    assert moves(queue, a=1) == [(2, "a")]


def test_each_goes_to_the_best_of_its_own_candidates() -> None:
    queue = [waiting(4, a=1), waiting(4, a=1, b=1)]
    assert moves(queue, a=2, b=0) == [(1, "b")]


@QUICK
@given(
    st.lists(st.tuples(*[st.floats(0.1, 4)] * 3), max_size=8),
    st.floats(0, 4),
    st.floats(0, 4),
)
def test_every_move_keeps_the_target_where_it_goes(
    works: list[tuple[float, float, float]], a_s: float, b_s: float
) -> None:
    queue = [waiting(here, a=a, b=b) for here, a, b in works]
    loads = {A: a_s, B: b_s}
    made = choose_moves(queue, 1.0, loads, 5.0)
    assert len({move.position for move in made}) == len(made)
    for move in made:
        loads[move.to] += queue[move.position].elsewhere_s[move.to]
        assert loads[move.to] <= 5.0
        assert move.gain_s > 0
