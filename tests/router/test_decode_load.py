"""What a prompt would find on a decode worker, now and when its prefill is done."""

import pytest

from router.curves import DecodeCurve, residual_quantiles
from router.decode_load import DecodeLoad, Decoding, Pace, Then, load_now, load_then, share_left

CURVE = DecodeCurve(step_s=0.01, sequence_s=0.001, context_token_s=0.0)
EQUAL = residual_quantiles((160,) * 8)
"""Answers of one length: what they have still to go is spread evenly below it."""
PACE = Pace(CURVE, EQUAL, tpot_s=0.05)


def there(running: int, coming: int = 0, each: int = 100, room: int = 100_000) -> Decoding:
    return Decoding(running, coming, each * (running + coming), room)


def test_the_load_is_the_step_with_the_prompt_by_nine_tenths_of_the_target() -> None:
    assert load_now(there(19), 100, PACE).share == pytest.approx(0.03 / 0.045)


def test_what_is_on_its_way_is_not_there_now_and_is_then() -> None:
    assert load_now(there(10, coming=20), 100, PACE) == load_now(there(10), 100, PACE)
    full = load_then(there(10, coming=20), 100, PACE, Then(0.0, 1.0))
    assert full.share == load_now(there(30), 100, PACE).share
    half = load_then(there(10, coming=20), 100, PACE, Then(0.0, 0.5))
    assert half.share == load_now(there(20), 100, PACE).share


def test_of_equal_answers_those_are_left_then_that_one_uniform_time_leaves() -> None:
    for steps in (0, 40, 80, 120, 200):
        assert share_left(EQUAL, steps) == pytest.approx(max(0.0, 1 - steps / 160), abs=0.02)
    assert share_left((), 50) == 1.0


def test_those_that_will_have_ended_make_room() -> None:
    step_s = CURVE.seconds(40, 0)
    then = load_then(there(40), 100, PACE, Then(80 * step_s, 1.0))
    assert then.share == pytest.approx(CURVE.seconds(21, 0) / 0.045, rel=0.02)


def test_memory_may_be_what_is_full() -> None:
    assert load_now(there(9, each=1000, room=8000), 500, PACE).share == 9500 / 8000
    assert load_now(there(4, coming=5, each=1000, room=8000), 500, PACE).share < 1.0


def test_whoever_would_be_alone_is_never_too_much() -> None:
    assert load_now(there(0, room=100), 5000, PACE) == DecodeLoad(0.0, 0.0)


def test_a_target_that_a_prompt_misses_alone_refuses_nobody() -> None:
    tight = Pace(CURVE, EQUAL, tpot_s=0.01)
    assert load_now(there(50), 100, tight).share == pytest.approx(5100 / 100_000)


def test_it_drains_when_all_but_the_part_that_fits_have_ended() -> None:
    load = load_now(there(79), 100, PACE)
    assert load.share == pytest.approx(2.0)
    assert load.drain_s == pytest.approx(80 * 0.05, abs=0.5)
    assert load_now(there(79), 100, PACE._replace(residuals=())).drain_s == 0.0
