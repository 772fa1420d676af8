"""The search: phases alone, then the best whole plans, then their neighbours, all by simulation.

Rounds are tasks that know nothing of each other, so any number of processes gives one answer.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple, Protocol

from core.parent import end_with_parent
from simulator.plan.advice import advise
from simulator.plan.combine import Candidate, Phase, colocate, lean, neighbours, pair_up
from simulator.plan.fleet import find_fleet
from simulator.plan.trial import (
    PHASE_WIDTH,
    Setup,
    decode_setup,
    find_goodput,
    plan_setup,
    prefill_setup,
)
from simulator.plan.types import Answer, Goodput, Option, Plan, Pool, Problem, Rated, scale_of
from simulator.processes import deaf_to_interrupts

_WORTH = 0.6
"""Workers whose goodput per GPU is below this share of the best get no further chunk sizes, and
pairs and lean plans that promise less are not simulated whole, but for the best that can run.
"""
_WHOLE = 4
_WHOLE_COLOCATED = 2
_CLIMBS = 2


class Progress(Protocol):
    """Hears how far a round is."""

    def __call__(self, text: str, done: int, total: int) -> None: ...


Rate = Callable[[str, Sequence[Setup]], list[Goodput]]
Shape = tuple[tuple[str, int, int, int], ...]


def search(
    problem: Problem, *, processes: int = 1, progress: Progress, rate_rps: float | None = None
) -> Answer:
    """The answer for `problem`. `rate_rps` is what the cluster shall serve, if that is known: it
    decides whether fewer GPUs would do.
    """
    with _rating(problem, processes, progress) as rate:
        prefills, decodes, both = _rate_workers(problem, rate)
        together = _distinct(colocate(problem, both))[:_WHOLE_COLOCATED]
        apart = _apart(problem, _best_chunks(prefills), decodes, both)
        fleets = _Fleets(problem, rate)
        rated = fleets.rate("whole plans", [*together, *apart])
        colocated = rated[: len(together)]
        best = _climb(problem, fleets, rated[len(together) :])
        best = _climb(problem, fleets, best, lambda plan: plan.can_run)
    served = [rated for rated in colocated if rated.goodput.rps > 0]
    baseline = max(served, key=_per_gpu, default=None)
    ranked = tuple(sorted((r for r in best if r.goodput.rps > 0), key=_per_gpu, reverse=True))
    return Answer(
        best=ranked,
        colocated=baseline,
        warnings=tuple(
            advise(
                problem,
                ranked,
                baseline,
                prefills=prefills,
                decodes=decodes,
                both=both,
                rate_rps=rate_rps,
            )
        ),
        simulated=len(best) + len(colocated),
    )


# -- rounds -------------------------------------------------------------------------------------


def _rate_workers(problem: Problem, rate: Rate) -> tuple[list[Phase], list[Phase], list[Phase]]:
    """Prefill, decode and colocated workers: all with the middle chunk size, then the good ones
    with the others. No round waits for another phase's: few processes are idle at its end.
    """
    chunks, options = sorted(problem.chunks), problem.options
    middle = chunks[len(chunks) // 2]
    setups = (partial(prefill_setup, problem), partial(_colocated_setup, problem))
    first = [[_Trial(option, middle, setup) for option in options] for setup in setups]
    least = chunks[0]  # beside a prefill pool that balances it, which computes nearly all
    decoding = [_Trial(option, least, lambda o, _: decode_setup(problem, o)) for option in options]
    prefills, both, decodes = _rate_phases(rate, "workers alone", [*first, decoding])
    others = [
        [
            _Trial(option, chunk, setup)
            for option in _good(phases)
            for chunk in chunks
            if chunk != middle
        ]
        for phases, setup in zip((prefills, both), setups, strict=True)
    ]
    more = _rate_phases(rate, "workers alone, other chunk sizes", others)
    return prefills + more[0], decodes, both + more[1]


class _Trial(NamedTuple):
    """A worker alone."""

    option: Option
    chunk: int
    setup: Callable[[Option, int], Setup]


def _rate_phases(rate: Rate, what: str, groups: Sequence[Sequence[_Trial]]) -> list[list[Phase]]:
    """All in one round."""
    trials = [trial for group in groups for trial in group]
    goodputs = iter(rate(what, [setup(option, chunk) for option, chunk, setup in trials]))
    return [
        [Phase(option, chunk, next(goodputs).rps) for option, chunk, _ in group] for group in groups
    ]


def _good(phases: Sequence[Phase]) -> list[Option]:
    best = max((phase.rps_per_gpu for phase in phases), default=0.0)
    return [phase.option for phase in phases if phase.rps_per_gpu >= _WORTH * best]


class _Fleets:
    """Rates whole plans. Plans that one fleet stands for are as good: it is simulated once."""

    def __init__(self, problem: Problem, rate: Rate) -> None:
        self._problem = problem
        self._rate = rate
        self._known: dict[Shape, Goodput] = {}

    def rate(self, what: str, candidates: Sequence[Candidate]) -> list[Rated]:
        """In the order given."""
        problem = self._problem
        fleets = [find_fleet(problem, c.plan, c.rps) for c in candidates]
        unknown: dict[Shape, Setup] = {}
        for c, fleet in zip(candidates, fleets, strict=True):
            shape = _shape(fleet)
            if shape not in self._known and shape not in unknown:
                unknown[shape] = plan_setup(problem, fleet, c.rps / scale_of(c.plan, fleet))
        if unknown:
            found = self._rate(what, list(unknown.values()))
            self._known.update(zip(unknown, found, strict=True))
        return [
            Rated(plan=candidate.plan, fleet=fleet, goodput=self._known[_shape(fleet)])
            for candidate, fleet in zip(candidates, fleets, strict=True)
        ]


def _apart(
    problem: Problem,
    prefills: Sequence[Phase],
    decodes: Sequence[Phase],
    both: Sequence[Phase],
) -> list[Candidate]:
    """The best few pairs and lean plans, and of either one that a cluster can be configured for."""
    chosen: dict[Shape, Candidate] = {}
    for found in (pair_up(problem, prefills, decodes), lean(problem, both)):
        least = _WORTH * max((one.rps_per_gpu for one in found), default=0.0)
        worth = [one for one in found[:_WHOLE] if one.rps_per_gpu >= least]
        can_run = [one for one in found if one.plan.can_run][:1]
        chosen |= {_shape(one.plan): one for one in (*worth, *can_run)}
    return list(chosen.values())


def _climb(
    problem: Problem,
    fleets: _Fleets,
    rated: list[Rated],
    of: Callable[[Plan], bool] = lambda plan: True,
) -> list[Rated]:
    """These, then from the best of some of them to better neighbours."""
    for _ in range(_CLIMBS):
        among = (one for one in rated if of(one.plan))
        best = max(among, key=_per_gpu, default=None)
        if best is None or best.goodput.rps == 0:
            return rated
        known = {_shape(one.plan) for one in rated}
        near = [p for p in neighbours(problem, best.plan) if _shape(p) not in known]
        guesses = [Candidate(plan, best.rps / best.plan.copies) for plan in near]
        rated += fleets.rate("other P:D ratios", guesses)
        if not near or _per_gpu(max(rated[-len(near) :], key=_per_gpu)) <= _per_gpu(best):
            return rated
    return rated


def _per_gpu(rated: Rated) -> float:
    return rated.rps_per_gpu


def _colocated_setup(problem: Problem, option: Option, step_tokens: int) -> Setup:
    pool = Pool(option=option, step_tokens=step_tokens, workers=1)
    guess_rps = 0.4 * prefill_setup(problem, option, step_tokens).guess_rps
    setup = plan_setup(problem, Plan(prefill=pool, decode=None), guess_rps)
    router = setup.router.model_copy(update={"admission": "off"})  # as the other phases alone
    return replace(setup, router=router, width=max(problem.width, PHASE_WIDTH))


def _best_chunks(phases: Sequence[Phase]) -> list[Phase]:
    """One of each worker; of chunk sizes that serve the same, the smallest."""
    best: dict[tuple[str, int], Phase] = {}
    for phase in sorted(phases, key=lambda phase: (-phase.rps, phase.step_tokens)):
        best.setdefault((phase.option.gpu, phase.option.tp), phase)
    return list(best.values())


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The best of each worker, whatever its chunk size."""
    best: dict[tuple[str, int], Candidate] = {}
    for candidate in candidates:
        option = candidate.plan.prefill.option
        best.setdefault((option.gpu, option.tp), candidate)
    return list(best.values())


def _shape(plan: Plan) -> Shape:
    return tuple((p.option.gpu, p.option.tp, p.step_tokens, p.workers) for p in plan.pools)


# -- processes ----------------------------------------------------------------------------------


@contextmanager
def _rating(problem: Problem, processes: int, progress: Progress) -> Iterator[Rate]:
    """A way to rate setups. Leaving the block ends all processes, whatever they do."""
    if processes <= 1:
        yield lambda what, setups: _collect(
            what, len(setups), progress, (find_goodput(problem, setup) for setup in setups)
        )
        return
    with ExitStack() as stack:
        with deaf_to_interrupts():
            pool = stack.enter_context(
                get_context("spawn").Pool(
                    processes, initializer=_begin, initargs=(problem, os.getpid())
                )
            )
        yield lambda what, setups: _collect(
            what, len(setups), progress, pool.imap(_rate_here, setups)
        )


def _collect(
    what: str, total: int, progress: Progress, goodputs: Iterable[Goodput]
) -> list[Goodput]:
    progress(what, 0, total)
    found: list[Goodput] = []
    for goodput in goodputs:
        found.append(goodput)
        progress(what, len(found), total)
    return found


_problem: Problem | None = None


def _begin(problem: Problem, parent: int) -> None:
    """In a process of the pool."""
    end_with_parent(parent)
    global _problem  # noqa: PLW0603 - what a process of the pool works on
    _problem = problem


def _rate_here(setup: Setup) -> Goodput:
    if _problem is None:
        raise RuntimeError("the pool's processes were not begun")
    return find_goodput(_problem, setup)
