from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import BatonError, InvalidRequest, Overloaded
from prefill_worker.config import PrefillConfig
from prefill_worker.policy import (
    FetchOption,
    FetchVerdict,
    fetch_patience_s,
    judge_fetch,
    refuse_prompt,
)
from tests.builders import QUICK

CONFIG = PrefillConfig(max_queued_tokens=100, max_legs=3)


def refusal(
    num_tokens: int, *, queued: int = 0, capacity: int = 1000, legs: int = 0
) -> BatonError | None:
    return refuse_prompt(num_tokens, capacity, queued, legs, CONFIG)


@pytest.mark.parametrize(
    ("num_tokens", "queued", "error"),
    [
        (0, 0, InvalidRequest),
        (1000, 0, type(None)),
        (1001, 0, InvalidRequest),
        (40, 60, type(None)),
        (41, 60, Overloaded),
        (500, 1, Overloaded),
    ],
)
def test_a_prompt_is_taken_when_it_fits_the_worker_and_its_queue(
    num_tokens: int, queued: int, error: type
) -> None:
    assert type(refusal(num_tokens, queued=queued)) is error


@pytest.mark.parametrize(("legs", "error"), [(2, type(None)), (3, Overloaded)])
def test_a_prompt_of_nothing_to_compute_is_taken_while_there_are_few(
    legs: int, error: type
) -> None:
    assert type(refusal(1, legs=legs)) is error


def test_the_refusal_names_both_lengths() -> None:
    refused = refusal(1001)
    assert refused is not None
    assert "1001" in refused.message
    assert "1000" in refused.message


# -- fetch or recompute -------------------------------------------------------------------------

WORTH_IT = FetchOption(
    missing_blocks=100,
    first_contact=False,
    transfer_s=0.02,
    since_fetch_s=0.0,
    recompute_s=0.5,
    rest_s=0.1,
    measured_steps=1,
)


def test_a_fetch_that_beats_the_prefill_it_saves_is_worth_it() -> None:
    assert judge_fetch(WORTH_IT) is FetchVerdict.FETCH


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"missing_blocks": 0}, FetchVerdict.NOTHING_MISSING),
        ({"missing_blocks": -3}, FetchVerdict.NOTHING_MISSING),
        ({"measured_steps": 0}, FetchVerdict.UNMEASURED),
        ({"transfer_s": 0.5}, FetchVerdict.SLOWER),
        ({"rest_s": 0.49}, FetchVerdict.SLOWER),
        ({"recompute_s": 0.0, "rest_s": 0.0}, FetchVerdict.SLOWER),
    ],
)
def test_a_fetch_is_not_worth_it(change: dict[str, float], verdict: FetchVerdict) -> None:
    assert judge_fetch(replace(WORTH_IT, **change)) is verdict  # type: ignore[arg-type]


def test_a_fetch_as_fast_as_the_prefill_is_not_worth_the_risk() -> None:
    even = replace(WORTH_IT, transfer_s=0.39)
    assert judge_fetch(even) is FetchVerdict.SLOWER
    assert judge_fetch(replace(even, transfer_s=0.3)) is FetchVerdict.FETCH


def test_the_tokens_left_after_the_fetch_count_against_it() -> None:
    short = replace(WORTH_IT, recompute_s=0.11, rest_s=0.1)
    assert judge_fetch(short) is FetchVerdict.SLOWER
    assert judge_fetch(replace(short, rest_s=0.05)) is FetchVerdict.FETCH


def test_a_first_contact_must_pay_as_well() -> None:
    little = replace(WORTH_IT, transfer_s=0.001, recompute_s=0.02, rest_s=0.0)
    assert judge_fetch(little) is FetchVerdict.FETCH
    assert judge_fetch(replace(little, first_contact=True)) is FetchVerdict.SLOWER
    assert judge_fetch(replace(WORTH_IT, first_contact=True)) is FetchVerdict.FETCH


def test_a_slow_reading_is_believed_less_as_it_ages() -> None:
    slow = replace(WORTH_IT, transfer_s=4.0)
    verdicts = [judge_fetch(replace(slow, since_fetch_s=age_s)) for age_s in (0, 30, 60, 120, 600)]
    assert verdicts == [FetchVerdict.SLOWER] * 3 + [FetchVerdict.FETCH] * 2


OPTIONS = st.builds(
    FetchOption,
    missing_blocks=st.integers(-5, 1000),
    first_contact=st.booleans(),
    transfer_s=st.floats(0, 100),
    since_fetch_s=st.floats(0, 1e6),
    recompute_s=st.floats(0, 100),
    rest_s=st.floats(0, 100),
    measured_steps=st.integers(0, 3),
)


@QUICK
@given(OPTIONS, st.floats(0, 10), st.floats(0, 10))
def test_a_faster_transfer_or_a_slower_prefill_never_speak_against_a_fetch(
    option: FetchOption, faster_s: float, slower_s: float
) -> None:
    better = replace(
        option,
        transfer_s=max(0.0, option.transfer_s - faster_s),
        recompute_s=option.recompute_s + slower_s,
    )
    if judge_fetch(option) is FetchVerdict.FETCH:
        assert judge_fetch(better) is FetchVerdict.FETCH


@QUICK
@given(OPTIONS, st.floats(-5, 100))
def test_a_fetch_waits_no_longer_than_the_deadline_or_the_prefill_it_saves_and_a_moment(
    option: FetchOption, remaining_s: float
) -> None:
    patience_s = fetch_patience_s(option, remaining_s)
    assert 0 <= patience_s <= max(0.0, remaining_s)
    assert patience_s <= option.recompute_s + 0.5
    if remaining_s > 0.5:
        assert patience_s >= 0.5


def test_a_fetch_may_take_a_few_times_what_was_predicted() -> None:
    assert fetch_patience_s(replace(WORTH_IT, recompute_s=60.0), 60.0) >= 3 * 0.02 + 0.5
