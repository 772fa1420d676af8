"""Who gives a running answer to whom."""

from core.ids import WorkerId
from router.freeness import DecodeRoom, pair_rooms, pick_answer


def room(name: str, context: int, running: int, tokens: int = 10_000) -> DecodeRoom:
    return DecodeRoom(WorkerId(name), tokens, context, running)


def test_freeness_is_the_steps_that_are_left_and_below_zero_where_somebody_waits() -> None:
    assert room("a", 9_000, 10).freeness == 100
    assert room("a", 12_000, 10).freeness == -200
    assert room("a", 0, 0).freeness == 10_000


def test_the_least_free_gives_to_the_freest_and_those_between_are_left_alone() -> None:
    full, low, fair = room("full", 12_000, 8), room("low", 9_900, 8), room("fair", 9_500, 8)
    free, freer = room("free", 2_000, 4), room("freer", 100, 1)
    assert pair_rooms([fair, low, freer, full, free]) == [(full, freer), (low, free)]


def test_nobody_gives_while_all_have_steps_left_or_nobody_has_many() -> None:
    assert pair_rooms([room("a", 9_000, 10), room("b", 0, 0)]) == []
    assert pair_rooms([room("a", 12_000, 10), room("b", 9_500, 10)]) == []
    assert pair_rooms([]) == []


def test_the_shortest_answer_moves_that_leaves_the_giver_the_less_free() -> None:
    giver, taker = room("giver", 12_000, 3), room("taker", 1_000, 1)
    assert pick_answer(giver, taker, [5_000, 3_000, 4_000]) == 1


def test_no_answer_moves_that_would_only_swap_the_two() -> None:
    giver, taker = room("giver", 10_500, 2), room("taker", 6_000, 2)
    assert pick_answer(giver, taker, [5_000, 5_500]) is None
    assert pick_answer(giver, taker, []) is None
