"""When one worker both computes a prompt and decodes its answer."""

import pytest

from core.ids import WorkerId
from router.decode_load import DecodeLoad
from router.local import LocalOption, LocalVerdict, StayOption, judge_local, judge_stay
from router.place import Beside
from router.policies.base import Slo

SLO = Slo(ttft_s=2.0, tpot_s=0.1)
THERE = Beside(
    worker_id=WorkerId("d"),
    queue_s=0.1,
    work_s=0.4,
    decode_s=0.02,
    delay_s=0.3,
    chunk_steps=4,
)
GOOD = LocalOption(measured=True, fits=lambda: True, beside=THERE, steps_to_go=0, elsewhere_s=0.9)


def there(**change: float) -> LocalOption:
    return GOOD._replace(beside=THERE._replace(**change))  # type: ignore[arg-type]


def test_a_prompt_that_is_sooner_there_and_harms_nobody_is_computed_there() -> None:
    assert judge_local(GOOD, SLO) is LocalVerdict.LOCAL


@pytest.mark.parametrize(
    ("option", "verdict"),
    [
        (GOOD._replace(measured=False), LocalVerdict.UNMEASURED),
        (GOOD._replace(fits=lambda: False), LocalVerdict.FULL),
        (there(delay_s=0.321), LocalVerdict.TPOT),
        (there(queue_s=0.21), LocalVerdict.SLOWER),
    ],
)
def test_each_reason_not_to(option: LocalOption, verdict: LocalVerdict) -> None:
    assert judge_local(option, SLO) is verdict


def test_a_costly_chunk_harms_nobody_where_nobody_runs() -> None:
    alone = there(decode_s=0.0, delay_s=2.0)
    assert judge_local(alone, SLO) is LocalVerdict.LOCAL


def test_a_step_may_miss_the_target_where_the_mean_over_the_answers_keeps_it() -> None:
    slow = there(delay_s=4 * 0.2)  # steps of 0.22 s
    assert judge_local(slow, SLO) is LocalVerdict.TPOT
    assert judge_local(slow._replace(steps_to_go=9), SLO) is LocalVerdict.TPOT
    assert judge_local(slow._replace(steps_to_go=10), SLO) is LocalVerdict.LOCAL


def test_answers_that_end_before_the_prompt_does_have_a_chunk_in_every_step() -> None:
    slow = THERE._replace(delay_s=40 * 0.2, chunk_steps=40)
    assert slow.mean_step_s(10) == pytest.approx(0.22)


def test_within_the_time_of_a_token_it_saves_the_hand_off() -> None:
    soon = there(queue_s=0.0, work_s=0.06)._replace(elsewhere_s=0.01)
    assert judge_local(soon, SLO) is LocalVerdict.LOCAL


def test_to_be_a_little_sooner_is_not_worth_slowing_answers() -> None:
    assert judge_local(GOOD._replace(elsewhere_s=0.7), SLO) is LocalVerdict.SLOWER


STAY = StayOption(
    measured=True,
    fits=lambda: True,
    beside=THERE,
    steps_to_go=0,
    here=DecodeLoad(0.3, 0.0),
    elsewhere=DecodeLoad(0.4, 0.0),
)


def test_an_answer_stays_where_there_is_less_to_decode() -> None:
    assert judge_stay(STAY, SLO)


@pytest.mark.parametrize(
    "option",
    [
        STAY._replace(measured=False),
        STAY._replace(here=None),
        STAY._replace(elsewhere=None),
        STAY._replace(here=DecodeLoad(0.4, 0.0)),
        STAY._replace(fits=lambda: False),
        STAY._replace(beside=THERE._replace(delay_s=0.321)),
    ],
    ids=[
        "no prefill measured",
        "no decode here",
        "nor there",
        "as much to decode",
        "no memory",
        "beyond the target",
    ],
)
def test_each_reason_to_go_on_elsewhere(option: StayOption) -> None:
    assert not judge_stay(option, SLO)


def test_alone_it_stays_however_long_its_steps_are() -> None:
    assert judge_stay(STAY._replace(beside=THERE._replace(decode_s=0.0, delay_s=2.0)), SLO)
