"""Row 9: what is drawn, and that forwarding and queues differ only under old reports."""

from itertools import pairwise
from statistics import fmean, median

import pytest

from benchmarks.reproduce.row_09_forward import ARRIVALS, SYSTEMS, draw_requests, share_in_time

POISSON, BURSTS = ARRIVALS


def test_lengths_are_those_of_the_code_trace() -> None:
    requests = draw_requests(POISSON, seed=1, count=4000)
    assert median(r.prompt_tokens for r in requests) == pytest.approx(1469, rel=0.05)
    assert fmean(r.prompt_tokens for r in requests) == pytest.approx(2000, rel=0.05)
    assert max(r.prompt_tokens for r in requests) == 7436


def test_bursts_come_at_once() -> None:
    def shortest_gaps(requests: list[float]) -> float:
        gaps = sorted(b - a for a, b in pairwise(requests))
        return gaps[len(gaps) // 2]

    poisson, bursts = (
        [r.at_s for r in draw_requests(arrivals, seed=1, count=1000)] for arrivals in ARRIVALS
    )
    assert shortest_gaps(bursts) < shortest_gaps(poisson) / 100


def test_old_reports_cost_queues_more_than_forwarding() -> None:
    requests = draw_requests(POISSON, seed=0, count=300)
    queued, forwarded = (
        [
            share_in_time(system, requests, routers=16, report_s=report_s, seed=0)
            for report_s in (0.0, 1.0)
        ]
        for system in SYSTEMS[:2]
    )
    assert queued[0] - queued[1] > 0.2
    assert forwarded[0] - forwarded[1] < 0.1
