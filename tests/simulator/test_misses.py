"""Missed targets, counted once each, and a run that ends when they are too many."""

from dataclasses import replace
from math import nan

from router.policies.base import Slo
from simulator.cluster import Cluster
from simulator.job import Record
from simulator.misses import Misses
from tests.simulator.clusters import ask, run, split

SLO = Slo(ttft_s=1.0, tpot_s=0.1)


def _record(at_s: float = 0.0, *, first_s: float = nan, outcome: str = "unfinished") -> Record:
    record = Record(at_s, prompt_tokens=10, output_tokens=1, first_s=first_s, end_s=first_s)
    return replace(record, outcome=outcome)


def _misses(counted: int, *, since_s: float = 0.0) -> Misses:
    return Misses(SLO, since_s=since_s, counted=counted, share=0.75)


def test_one_that_is_late_and_then_ends_is_missed_once() -> None:
    misses, record = _misses(4), _record()
    assert not misses.late(record)
    record.first_s, record.end_s, record.outcome = 2.0, 2.0, "ok"
    assert not misses.note(record)
    assert misses.share == 0.75
    assert misses.note(_record(first_s=3.0, outcome="ok"))
    assert misses.share == 0.5


def test_those_that_never_end_are_missed_once_too() -> None:
    misses = _misses(4)
    misses.late(_record())
    misses.never_ended(2)
    assert misses.share == 0.5


def test_who_came_before_the_count_began_is_not_counted() -> None:
    misses = _misses(4, since_s=1.0)
    early = _record(0.5)
    misses.late(early)
    misses.note(early)
    misses.note(_record(0.9, outcome="refused"))
    assert misses.share == 1.0


def test_a_run_ends_when_too_many_wait_beyond_their_target() -> None:
    spec = replace(split(), slo=Slo(ttft_s=0.5, tpot_s=1.0))
    requests = [ask(0.01 * i) for i in range(40)]  # one prefill worker takes 0.16 s for each
    whole = run(spec, requests)
    waiting: list[float] = []

    def late(record: Record) -> bool:
        assert record.first_s != record.first_s
        waiting.append(record.at_s)
        return len(waiting) >= 10

    ended = Cluster(spec).run(requests, late=late)
    assert len(ended.records) < len(whole.records) == 40
    late_ones = [r.at_s for r in whole.records if r.ttft_s > 0.5]
    assert waiting == late_ones[: len(waiting)]
