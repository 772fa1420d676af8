"""Summaries of samples, and the order in which they are taken."""

import pytest

from benchmarks.numbers import Samples, interleave, percentile


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


async def test_ways_take_turns_at_the_first_place_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []

    async def slow() -> float:
        calls.append("slow")
        return float(len(calls))

    async def fast() -> float:
        calls.append("fast")
        return float(len(calls))

    rounds: list[int] = []
    samples = await interleave(2, {"slow": slow, "fast": fast}, on_round=rounds.append)
    assert calls == ["slow", "fast", "fast", "slow", "slow", "fast"]
    assert samples == {"slow": Samples((4.0, 5.0)), "fast": Samples((3.0, 6.0))}
    assert rounds == [1, 2, 3]
