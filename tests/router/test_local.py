"""When a decode worker computes a prompt itself."""

from dataclasses import replace
from typing import Any

import pytest

from router.local import LocalOption, LocalVerdict, judge_local
from router.policies.base import Slo

SLO = Slo(ttft_s=2.0, tpot_s=0.1)
GOOD = LocalOption(
    measured=True, fits=lambda: True, decode_s=0.02, chunk_s=0.03, here_s=0.5, elsewhere_s=0.6
)


def test_a_prompt_that_is_sooner_there_and_harms_nobody_is_computed_there() -> None:
    assert judge_local(GOOD, SLO) is LocalVerdict.LOCAL


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"measured": False}, LocalVerdict.UNMEASURED),
        ({"fits": lambda: False}, LocalVerdict.FULL),
        ({"chunk_s": 0.081}, LocalVerdict.TPOT),
        ({"here_s": 0.61}, LocalVerdict.SLOWER),
    ],
)
def test_each_reason_not_to(change: dict[str, Any], verdict: LocalVerdict) -> None:
    assert judge_local(replace(GOOD, **change), SLO) is verdict


def test_a_costly_chunk_harms_nobody_where_nobody_runs() -> None:
    alone = replace(GOOD, decode_s=0.0, chunk_s=0.5)
    assert judge_local(alone, SLO) is LocalVerdict.LOCAL


def test_within_the_time_of_a_token_it_saves_the_hand_off() -> None:
    soon = replace(GOOD, here_s=0.09, elsewhere_s=0.01)
    assert judge_local(soon, SLO) is LocalVerdict.LOCAL
