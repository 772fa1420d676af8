"""Summaries of samples, and the order in which they are taken."""

import pytest

from benchmarks.numbers import Samples, interleave
from core.estimate import percentile


@pytest.mark.parametrize(
    ("share", "value"), [(0.0, 1.0), (0.5, 3.0), (0.9, 4.6), (1.0, 5.0), (0.25, 2.0)]
)
def test_a_percentile_lies_between_its_neighbours(share: float, value: float) -> None:
    assert percentile([5.0, 1.0, 4.0, 2.0, 3.0], share) == pytest.approx(value)


def test_one_sample_is_every_percentile_of_itself() -> None:
    assert percentile([7.0], 0.9) == 7.0


def test_throughput_is_that_of_the_median() -> None:
    samples = Samples((1.0, 0.5, 100.0))
    assert samples.median_s == 1.0
    assert samples.gb_per_s(2_000_000_000) == 2.0
    assert samples.spread() == "500.00..100000.00"


async def test_every_round_has_an_order_of_its_own_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []

    async def slow() -> float:
        calls.append("slow")
        return float(len(calls))

    async def fast() -> float:
        calls.append("fast")
        return float(len(calls))

    rounds: list[int] = []
    samples = await interleave(8, {"slow": slow, "fast": fast}, on_round=rounds.append)
    assert calls[:2] == ["slow", "fast"], "the warm-up"
    turns = [calls[i : i + 2] for i in range(2, len(calls), 2)]
    assert all(sorted(turn) == ["fast", "slow"] for turn in turns)
    assert ["slow", "fast"] in turns
    assert ["fast", "slow"] in turns
    assert [len(way.seconds) for way in samples.values()] == [8, 8]
    assert min(min(way.seconds) for way in samples.values()) == 3.0
    assert rounds == list(range(1, 10))
