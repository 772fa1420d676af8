"""The fleet that is simulated in a plan's place, and how long. Pure.

A run must last, or it offers a burst and not a rate; and all workers of a large plan for so long
take minutes. So fewer workers in nearly the same ratio stand for them.
"""

from collections.abc import Iterator
from dataclasses import replace

from simulator.plan.types import Plan, Problem, scale_of

_MOST_WORKERS = 8
_MOST_REQUESTS = 2400
_PHASE_REQUESTS = 1000
"""A phase alone only decides which plans are simulated whole, and whether a given rate is low."""
_COVERED = 0.9
"""Share of a plan's GPUs that copies of its fleet must account for."""
_STAYS = 3
_PHASE_STAYS = 10


def whole_run_s(problem: Problem) -> float:
    """Arrivals of a run of a whole plan: `run_s`, and never less than three stays."""
    return max(problem.run_s, _STAYS * whole_stay_s(problem))


def phase_run_s(problem: Problem, guess_rps: float, stay_s: float) -> float:
    """Arrivals of a run of one phase in which a request stays `stay_s`: as long, or ten stays, or
    what some 1,000 requests take, if that is less; never less than three stays.
    """
    shortest = min(problem.run_s, _PHASE_STAYS * stay_s, _PHASE_REQUESTS / guess_rps)
    return max(_STAYS * stay_s, shortest)


def whole_stay_s(problem: Problem) -> float:
    """How long a mean request that just keeps its targets stays."""
    outputs = sum(request.output_tokens for request in problem.requests) / len(problem.requests)
    return problem.slo.ttft_s + problem.slo.tpot_s * outputs


def find_fleet(problem: Problem, plan: Plan, rps: float) -> Plan:
    """The workers that stand for one copy of a plan that should serve `rps`: at most eight, and so
    few that a run has about 2,400 requests, but at least one of each phase. Where the ratio is too
    far from 1 for so few, twice as many, and so on.
    """
    workers = sum(pool.workers for pool in plan.pools)
    affordable = (
        int(_MOST_REQUESTS / (whole_run_s(problem) * rps / workers)) if rps > 0 else workers
    )
    most = max(len(plan.pools), min(_MOST_WORKERS, affordable))
    while True:
        fleet = shrink(plan, most)
        if most >= workers or _covered(plan, fleet) >= _COVERED:
            return fleet
        most *= 2


def shrink(plan: Plan, most: int) -> Plan:
    """Of all fleets of at most `most` workers, the one whose copies account for most of the plan's
    GPUs; of equal ones the largest.
    """
    return max(_fleets(plan, most), key=lambda fleet: (_covered(plan, fleet), fleet.gpus))


def _covered(plan: Plan, fleet: Plan) -> float:
    return scale_of(plan, fleet) * fleet.gpus * plan.copies / plan.gpus


def _fleets(plan: Plan, most: int) -> Iterator[Plan]:
    for prefills in range(1, min(most, plan.prefill.workers) + 1):
        prefill = replace(plan.prefill, workers=prefills)
        if plan.decode is None:
            yield Plan(prefill=prefill, decode=None)
            continue
        for decodes in range(1, min(most - prefills, plan.decode.workers) + 1):
            yield Plan(prefill=prefill, decode=replace(plan.decode, workers=decodes))
