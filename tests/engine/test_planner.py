from hypothesis import given
from hypothesis import strategies as st

from engine.planner import plan_step
from tests.builders import QUICK

PENDING = st.lists(st.integers(1, 50), max_size=20)
BUDGET, BATCH = st.integers(1, 40), st.integers(1, 12)


def test_decodes_go_first_and_chunks_share_the_rest() -> None:
    assert plan_step([10, 1, 20, 1], step_tokens=16, max_batch=8) == [10, 1, 4, 1]


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    assert plan_step([100], step_tokens=16, max_batch=8) == [16]


def test_prompts_keep_their_order() -> None:
    assert plan_step([30, 5], step_tokens=16, max_batch=8) == [16, 0]


def test_no_more_sequences_than_the_batch_holds() -> None:
    assert plan_step([2, 2, 2], step_tokens=16, max_batch=2) == [2, 2, 0]


def test_the_first_decodes_go_when_there_are_too_many() -> None:
    assert plan_step([1, 1, 1], step_tokens=16, max_batch=2) == [1, 1, 0]


def test_decodes_alone_may_exceed_the_budget() -> None:
    assert plan_step([1, 1, 1], step_tokens=2, max_batch=8) == [1, 1, 1]


def test_a_prompt_gets_on_however_many_decode() -> None:
    assert plan_step([1, 1, 1, 5], step_tokens=2, max_batch=8) == [1, 1, 1, 1]
    assert plan_step([1, 1, 1, 5], step_tokens=16, max_batch=3) == [1, 1, 0, 5]


def test_prompts_that_end_with_the_step_share_it() -> None:
    assert plan_step([40, 10, 1, 20], 64, 8, chunk_tokens=16) == [15, 10, 1, 0]
    assert plan_step([16, 10, 16, 9, 30], 64, 8, chunk_tokens=16) == [16, 10, 16, 9, 0]
    assert plan_step([16, 16, 16, 16, 16], 64, 8, chunk_tokens=16) == [16, 16, 16, 16, 0]


def test_nobody_overtakes_a_prompt_that_does_not_end_with_the_step() -> None:
    assert plan_step([16, 40, 3], 64, 8, chunk_tokens=16) == [16, 0, 0]
    assert plan_step([6, 40, 3], 64, 8, chunk_tokens=16) == [6, 10, 3]


def test_decodes_as_many_as_a_chunk_leave_a_long_prompt_what_the_step_has_room_for() -> None:
    for decodes, fed in ((10, 54), (60, 8), (100, 8), (252, 4), (256, 1)):
        assert plan_step([1] * decodes + [900], 256, 400, chunk_tokens=64)[-1] == fed


def test_a_chunk_is_no_larger_than_the_step() -> None:
    assert plan_step([100, 3], 16, 8, chunk_tokens=64) == plan_step([100, 3], 16, 8)


@QUICK
@given(PENDING, BUDGET, BATCH, BUDGET)
def test_a_prompt_gets_one_chunk_and_those_behind_it_only_if_they_end(
    pending: list[int], step_tokens: int, max_batch: int, chunk_tokens: int
) -> None:
    feed = plan_step(pending, step_tokens, max_batch, chunk_tokens)
    decodes = sum(count for count, tokens in zip(feed, pending, strict=True) if tokens == 1)
    prompts = [(n, tokens) for n, tokens in zip(feed, pending, strict=True) if tokens > 1]
    assert sum(feed) <= max(step_tokens, decodes + 1)
    assert all(count <= chunk_tokens for count, _ in prompts)
    fed = [count > 0 for count, _ in prompts]
    assert fed == sorted(fed, reverse=True), "in order"
    partly = [count for count, tokens in prompts if 0 < count < tokens]
    assert len(partly) <= 1
    assert sum(partly) <= max(1, chunk_tokens - decodes, chunk_tokens // 8)


@QUICK
@given(PENDING, BUDGET, BATCH)
def test_never_over_budget_unless_decodes_alone_are(
    pending: list[int], step_tokens: int, max_batch: int
) -> None:
    feed = plan_step(pending, step_tokens, max_batch)
    decodes = sum(count for count, tokens in zip(feed, pending, strict=True) if tokens == 1)
    assert sum(feed) <= max(step_tokens, decodes + 1)


@QUICK
@given(PENDING, BUDGET, BATCH)
def test_never_more_than_is_pending_or_fits_the_batch(
    pending: list[int], step_tokens: int, max_batch: int
) -> None:
    feed = plan_step(pending, step_tokens, max_batch)
    assert all(0 <= count <= tokens for count, tokens in zip(feed, pending, strict=True))
    assert sum(count > 0 for count in feed) <= max_batch


@QUICK
@given(PENDING.filter(bool), BUDGET, BATCH)
def test_whatever_is_pending_some_of_it_is_fed(
    pending: list[int], step_tokens: int, max_batch: int
) -> None:
    assert sum(plan_step(pending, step_tokens, max_batch)) > 0


@QUICK
@given(PENDING, BUDGET, BATCH)
def test_a_prompt_takes_at_most_one_place_from_decodes(
    pending: list[int], step_tokens: int, max_batch: int
) -> None:
    feed = plan_step(pending, step_tokens, max_batch)
    decodes = sum(tokens == 1 for tokens in pending)
    fed = sum(count for tokens, count in zip(pending, feed, strict=True) if tokens == 1)
    assert fed >= min(decodes, max(1, max_batch - 1))
