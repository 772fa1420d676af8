"""How much of a prompt is computed beside answers that decode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.step import LEAST_CHUNK_TOKENS, StepBudget, StepWork, chunk_within, work_alone
from tests.builders import QUICK

MOST = 512
TOKEN_S, PAIR_S = 2e-5, 1e-9


def chunk_s(start: int, tokens: int, token_s: float = TOKEN_S, pair_s: float = PAIR_S) -> float:
    return tokens * token_s + (tokens * start + tokens * tokens / 2) * pair_s


@QUICK
@given(st.floats(-0.01, 0.1), st.integers(0, 100_000), st.floats(1e-7, 1e-3), st.floats(0.0, 1e-7))
def test_a_chunk_is_the_longest_that_fits_into_the_room(
    room_s: float, start: int, token_s: float, pair_s: float
) -> None:
    tokens = chunk_within(room_s, start, token_s, pair_s, MOST)
    assert LEAST_CHUNK_TOKENS <= tokens <= MOST
    if tokens > LEAST_CHUNK_TOKENS:
        assert chunk_s(start, tokens, token_s, pair_s) <= room_s * (1 + 1e-9)
    if tokens < MOST:
        assert chunk_s(start, tokens + 1, token_s, pair_s) > room_s * (1 - 1e-9)


def test_without_any_room_a_prompt_moves_on_all_the_same() -> None:
    assert chunk_within(-1.0, 0, TOKEN_S, PAIR_S, MOST) == LEAST_CHUNK_TOKENS
    assert chunk_within(-1.0, 0, TOKEN_S, PAIR_S, most=16) == 16


def step_s(start: int, tokens: int, sequences: int, context_tokens: int) -> float:
    """Of a machine three times as slow as the prior, with another shape."""
    return 0.02 + chunk_s(start, tokens, 8e-5, 2e-9) + sequences * 1e-4 + context_tokens * 1e-7


def taught(target_s: float | None) -> StepBudget:
    budget = StepBudget(target_s)
    for i in range(200):
        start, tokens, sequences = 700 * (i % 9), 64 + 64 * (i % 7), 1 + i % 5
        seconds = step_s(start, tokens, sequences, 3000 * sequences)
        budget.saw([(start, start + tokens)], sequences, 3000 * sequences, seconds, float(i))
    return budget


@pytest.mark.parametrize(("start", "sequences"), [(0, 1), (2000, 4), (5000, 2)])
def test_a_step_comes_near_the_target_by_what_such_steps_have_taken(
    start: int, sequences: int
) -> None:
    tokens = taught(0.045).chunk_tokens(start, sequences, 3000 * sequences, MOST)
    assert LEAST_CHUNK_TOKENS < tokens < MOST
    assert step_s(start, tokens, sequences, 3000 * sequences) == pytest.approx(0.045, rel=0.05)


def test_more_answers_or_a_longer_history_leave_less_room() -> None:
    budget = taught(0.045)
    alone = budget.chunk_tokens(0, 1, 3000, MOST)
    assert budget.chunk_tokens(0, 40, 120_000, MOST) < alone
    assert budget.chunk_tokens(60_000, 1, 3000, MOST) < alone


def test_nothing_is_bounded_where_nobody_decodes_or_nothing_is_known_or_wanted() -> None:
    assert taught(0.045).chunk_tokens(0, 0, 0, MOST) == MOST
    assert StepBudget(0.045).chunk_tokens(0, 4, 12_000, MOST) == MOST
    assert taught(None).chunk_tokens(0, 4, 12_000, MOST) == MOST


def test_of_many_steps_in_a_second_one_is_learned_from() -> None:
    budget = taught(0.045)
    before = budget.chunk_tokens(0, 1, 3000, MOST)
    for i in range(50):
        budget.saw([(0, 512)], 1, 3000, 9.0, 199.0 + i / 1000)
    assert budget.chunk_tokens(0, 1, 3000, MOST) == before


def test_work_of_steps_adds_up() -> None:
    total = StepWork().plus([(0, 4), (2, 5)]).plus([], steps=3)
    assert total == (4, 7, (1 + 2 + 3 + 4) + (3 + 4 + 5))
    assert total.since(StepWork().plus([(0, 4)])) == (3, 3, 3 + 4 + 5)
    assert work_alone(3, 11, step_tokens=4) == (2, 8, sum(range(4, 12)))
    assert work_alone(5, 5) == (0, 0, 0)
