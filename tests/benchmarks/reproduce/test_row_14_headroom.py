"""Row 14: the lengths, the two measures, and that rules differ as they should."""

from dataclasses import replace
from statistics import fmean

import pytest

from benchmarks.reproduce.row_14_headroom import (
    AGGRESSIVE,
    CONSERVATIVE,
    PAST_FUTURE,
    draw_requests,
    is_unbroken,
    keeps_targets,
    serve,
)
from simulator.job import Record


def test_lengths_have_the_published_mean_and_tail() -> None:
    requests = draw_requests(seed=1, count=8000)
    outputs = sorted(r.output_tokens for r in requests)
    assert fmean(outputs) == pytest.approx(1502, rel=0.03)
    assert outputs[int(0.99 * len(outputs))] == pytest.approx(4890, rel=0.1)


def test_a_mean_hides_an_eviction_and_the_other_measure_does_not() -> None:
    whole = Record(0.0, 100, 1000, first_s=0.1, end_s=10.0)
    evicted = replace(whole, evictions=1)
    late = replace(whole, transfer_s=6.0)
    assert [keeps_targets(r) for r in (whole, evicted, late)] == [True, True, True]
    assert [is_unbroken(r) for r in (whole, evicted, late)] == [True, False, False]


def test_evictions_fall_from_rule_to_rule() -> None:
    requests = draw_requests(seed=0, count=200)
    evictions = {
        rule: sum(r.evictions for r in serve(rule, requests, 5.0, 0))
        for rule in (AGGRESSIVE, PAST_FUTURE, CONSERVATIVE)
    }
    assert evictions[AGGRESSIVE] > evictions[PAST_FUTURE] >= evictions[CONSERVATIVE] == 0
