"""When a decode worker computes a prompt itself."""

from dataclasses import replace

import pytest

from router.local import LocalOption, LocalVerdict, judge_local
from router.policies.base import Slo

SLO = Slo(ttft_s=2.0, tpot_s=0.1)
GOOD = LocalOption(
    prompt_tokens=1000,
    uncached_tokens=100,
    measured=True,
    fits=True,
    step_s=0.02,
    suffix_s=0.03,
    queue_s=0.0,
    elsewhere_s=0.03,
)


def test_a_short_rest_that_harms_nobody_is_computed_there() -> None:
    assert judge_local(GOOD, SLO) is LocalVerdict.LOCAL


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"uncached_tokens": 251}, LocalVerdict.LONG),
        ({"prompt_tokens": 100_000, "uncached_tokens": 513}, LocalVerdict.LONG),
        ({"measured": False}, LocalVerdict.UNMEASURED),
        ({"fits": False}, LocalVerdict.FULL),
        ({"suffix_s": 0.081}, LocalVerdict.TPOT),
        ({"queue_s": 0.06}, LocalVerdict.SLOWER),
    ],
)
def test_each_reason_not_to(change: dict[str, float], verdict: LocalVerdict) -> None:
    assert judge_local(replace(GOOD, **change), SLO) is verdict


def test_a_queue_there_matters_less_than_a_longer_one_elsewhere() -> None:
    busy = replace(GOOD, queue_s=0.5, elsewhere_s=1.0)
    assert judge_local(busy, SLO) is LocalVerdict.LOCAL
