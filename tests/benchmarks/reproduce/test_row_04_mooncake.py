"""Row 4: the cost formula, and a small run of every system."""

import pytest

from benchmarks.reproduce.row_04_mooncake import LATENCY, SYSTEMS, fare
from engine.latency.base import StepShape


def test_a_prompt_takes_what_the_papers_formula_says() -> None:
    tokens, layers, width = 8192, 80, 8192
    flops = layers * (4 * tokens**2 * width + 22 * tokens * width**2)
    seconds = LATENCY.step_s(StepShape([(0, tokens)]))
    assert seconds == pytest.approx(flops / (0.6 * 8 * 312e12), rel=0.01)


@pytest.mark.timeout(60)
def test_every_system_is_asked_the_same_and_caches_no_more_than_there_is() -> None:
    fares = {one.name: fare(None, 1.5, one, seed=0, count=300) for one in SYSTEMS}
    assert len({one.ideal_share for one in fares.values()}) == 1
    assert all(0 < one.hit_share <= one.ideal_share for one in fares.values())
    assert fares["mooncake_ttft, fetching"].hit_share > fares["mooncake_ttft"].hit_share
    assert fares["random"].ttft_s > 2 * fares["baton"].ttft_s
