"""Generated arrivals: the rate they follow, and how irregular they are."""

from itertools import pairwise
from random import Random
from statistics import fmean, stdev

import pytest

from simulator.workload.arrivals import Constant, Ramp, Rate, Sine, Step, draw_arrivals
from simulator.workload.build import Shaping
from simulator.workload.load import load_workload
from simulator.workload.records import BadTrace

RATES: list[Rate] = [Constant(3), Ramp(1, 9, 200), Sine(4, 3, 60), Step(1, 6, 100)]


@pytest.mark.parametrize("rate", RATES)
def test_as_many_come_as_the_rate_says(rate: Rate) -> None:
    times_s = draw_arrivals(rate, 2000, Random(3), cv=0)
    for count in (100, 700, 2000):
        assert rate.total(times_s[count - 1]) == pytest.approx(count, abs=1.5)


@pytest.mark.parametrize("rate", RATES)
def test_the_total_is_the_integral_of_the_rate(rate: Rate) -> None:
    slices = [i / 10 + 0.05 for i in range(2500)]
    assert rate.total(250.0) == pytest.approx(sum(rate.at(t) / 10 for t in slices), rel=1e-3)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gaps_have_the_variation_asked_for(cv: float) -> None:
    times_s = draw_arrivals(Constant(2), 40_000, Random(1), cv=cv)
    gaps = [b - a for a, b in pairwise(times_s)]
    assert fmean(gaps) == pytest.approx(0.5, rel=0.05)
    assert stdev(gaps) / fmean(gaps) == pytest.approx(cv, rel=0.05)


def test_a_generator_has_its_lengths_and_shared_prefix() -> None:
    source = "poisson:rate=2,prompt=2048,output=7,shared=1024,requests=50"
    workload = load_workload(source).workload
    first, *others = (request.hashes for request in workload.requests)
    assert len(workload.requests) == 50
    assert {(r.prompt_tokens, r.output_tokens) for r in workload.requests} == {(2048, 7)}
    assert all(other[:2] == first[:2] and other[2] != first[2] for other in others)


def test_a_generator_is_drawn_by_its_seed() -> None:
    source = "gamma:rate=2,cv=3,spread=0.6"
    again = [load_workload(source, Shaping(seed=seed)).workload for seed in (1, 1, 2)]
    assert again[0] == again[1]
    assert again[0] != again[2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("poisson:speed=2", "poisson has no 'speed'"),
        ("poisson:rate=fast", "not a number"),
        ("poisson:rate=0", "cannot be 0"),
        ("sine:rate=1,amplitude=2", "amplitude"),
    ],
)
def test_a_wrong_generator_is_a_sentence(source: str, message: str) -> None:
    with pytest.raises(BadTrace, match=message):
        load_workload(source)
