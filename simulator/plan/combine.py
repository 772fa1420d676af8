"""From what one worker of each phase serves to whole plans that are worth simulating. Pure.

DistServe (OSDI'24): algorithm 1 (any placement) takes the best worker of each phase and as many of
each as the rate needs, algorithm 2 (slow network) packs both phases into a node. Here the GPUs are
given and the rate is sought, so all pairs of workers are kept, each with its best P:D ratio.

That ratio takes all prompts to be computed by prefill workers. Here decode workers compute many
themselves (router/local.py), so lean plans are tried beside it: a few prefill workers, and as many
decode workers as fit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from simulator.plan.types import Affinity, Option, Plan, Pool, Problem

_FULL = 0.75
"""A plan that leaves more than a quarter of the GPUs idle is no use of them."""
_LEAN = 1 / 4
"""Share of the GPUs that prefill; a search goes on from there (`neighbours`)."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A worker of one phase (or of both), and the requests/s that it serves alone."""

    option: Option
    step_tokens: int
    rps: float

    @property
    def rps_per_gpu(self) -> float:
        return self.rps / self.option.tp

    def pool(self, workers: int) -> Pool:
        return Pool(option=self.option, step_tokens=self.step_tokens, workers=workers)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan and the rate that one copy of it should serve, by its phases."""

    plan: Plan
    rps: float

    @property
    def rps_per_gpu(self) -> float:
        return self.rps * self.plan.copies / self.plan.gpus


def pair_up(
    problem: Problem, prefills: Sequence[Phase], decodes: Sequence[Phase]
) -> list[Candidate]:
    """The best ratio of every pair, best pair first."""
    found: list[Candidate] = []
    for prefill in prefills:
        for decode in decodes:
            ratios = list(_ratios(problem, prefill, decode))
            if ratios:
                most = max(candidate.plan.gpus for candidate in ratios)
                found.append(max(ratios, key=lambda candidate: _worth(candidate, most)))
    return sorted(found, key=lambda candidate: -candidate.rps_per_gpu)


def lean(problem: Problem, phases: Sequence[Phase]) -> list[Candidate]:
    """One of each worker that does both, with itself: decode workers take a prompt in steps as
    large as prefill workers do. Best first, by what it serves alone.
    """
    counts = gpus_of(problem)
    found: dict[tuple[str, int], Candidate] = {}
    for phase in sorted(phases, key=lambda phase: -phase.rps_per_gpu):
        option, kind = phase.option, (phase.option.gpu, phase.option.tp)
        if kind in found or phase.rps <= 0:
            continue
        node = problem.affinity is Affinity.LOW
        gpus = _node_gpus(problem, option) if node else min(problem.gpus, counts[option.gpu])
        workers = max(1, round(_LEAN * gpus / option.tp))
        room = _room(problem, option, option, workers)
        if room > 0:
            copies = _copies(problem, option)
            plan = Plan(prefill=phase.pool(workers), decode=phase.pool(room), copies=copies)
            found[kind] = Candidate(plan, phase.rps * (workers + room))
    return list(found.values())


def fits_apart(problem: Problem) -> bool:
    """Whether there are GPUs for a prefill worker and a decode worker of any kind."""
    return any(
        _room(problem, prefill, decode, 1) > 0
        for prefill in problem.options
        for decode in problem.options
    )


def neighbours(problem: Problem, plan: Plan) -> list[Plan]:
    """The plan with one prefill worker more or less (of many workers, an eighth of them: less is no
    other fleet in the simulation), and as many decode workers as then fit.
    """
    if plan.decode is None:
        return []
    found: list[Plan] = []
    step = max(1, (plan.prefill.workers + plan.decode.workers) // 8)
    for prefills in (plan.prefill.workers - step, plan.prefill.workers + step):
        if prefills <= 0:
            continue
        room = _room(problem, plan.prefill.option, plan.decode.option, prefills)
        if room > 0:
            prefill = replace(plan.prefill, workers=prefills)
            found.append(replace(plan, prefill=prefill, decode=replace(plan.decode, workers=room)))
    return found


def colocate(problem: Problem, phases: Sequence[Phase]) -> list[Candidate]:
    """Every worker that does both, as often as there are GPUs for it; best first. Where its KV
    would go does not matter, so affinity does not either.
    """
    counts = gpus_of(problem)
    found: list[Candidate] = []
    for phase in phases:
        workers = min(problem.gpus, counts[phase.option.gpu]) // phase.option.tp
        if workers > 0 and phase.rps > 0:
            plan = Plan(prefill=phase.pool(workers), decode=None)
            found.append(Candidate(plan, phase.rps * workers))
    return sorted(found, key=lambda candidate: -candidate.rps_per_gpu)


def gpus_of(problem: Problem) -> Mapping[str, int]:
    """How many of each kind there are."""
    return {offer.gpu: offer.count for offer in problem.offers}


def _worth(candidate: Candidate, most: int) -> tuple[bool, float, int]:
    plan = candidate.plan
    return plan.gpus >= _FULL * most, candidate.rps_per_gpu, plan.gpus


def _ratios(problem: Problem, prefill: Phase, decode: Phase) -> Iterator[Candidate]:
    """Each number of prefill workers with the decode workers it feeds, as far as they fit."""
    if prefill.rps <= 0 or decode.rps <= 0:
        return
    prefills = 1
    while (room := _room(problem, prefill.option, decode.option, prefills)) > 0:
        fed = prefills * prefill.rps / decode.rps
        for decodes in {max(1, min(room, int(fed))), min(room, int(fed) + 1)}:
            plan = Plan(
                prefill=prefill.pool(prefills),
                decode=decode.pool(decodes),
                copies=_copies(problem, prefill.option),
            )
            yield Candidate(plan, min(prefills * prefill.rps, decodes * decode.rps))
        prefills += 1


def _room(problem: Problem, prefill: Option, decode: Option, prefills: int) -> int:
    """Decode workers that fit beside so many prefill workers; of one node, with low affinity."""
    counts, used = gpus_of(problem), prefills * prefill.tp
    if problem.affinity is Affinity.LOW:
        if prefill.gpu != decode.gpu:
            return 0
        return (_node_gpus(problem, prefill) - used) // decode.tp
    left = min(problem.gpus - used, counts[decode.gpu])
    if prefill.gpu == decode.gpu:
        left = min(left, counts[decode.gpu] - used)
    elif used > counts[prefill.gpu]:
        return 0
    return left // decode.tp


def _copies(problem: Problem, option: Option) -> int:
    if problem.affinity is Affinity.HIGH:
        return 1
    return min(problem.gpus, gpus_of(problem)[option.gpu]) // _node_gpus(problem, option)


def _node_gpus(problem: Problem, option: Option) -> int:
    return min(problem.node_gpus, problem.gpus, gpus_of(problem)[option.gpu])
