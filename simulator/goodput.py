"""The highest goodput of several systems at the same GPUs: a search over the request rate.

Goodput is requests per second and GPU at the highest rate at which a share of all requests (0.9)
keeps both the TTFT and the TPOT target (DistServe, OSDI'24). All systems of a seed are asked the
same requests, with gaps divided by the rate (common random numbers); each seed begins in the trace
where the one before ends, round and round. Each (system, seed) is a search of its own, so any
number of processes gives the same result.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import starmap
from math import isfinite

from core.errors import InvalidRequest
from core.estimate import Estimate
from router.config import RouterConfig
from simulator.build import Settings, build_spec
from simulator.closed import BEGIN_S, run_sessions, sessions_needed
from simulator.cluster import Cluster
from simulator.config import SimulatedPool
from simulator.misses import Misses
from simulator.processes import run_all
from simulator.workload.build import Shaping, check_rate
from simulator.workload.load import load_workload
from simulator.workload.types import Workload

LEAST_TARGETS = 20
"""TTFT targets that a run of open arrivals should last: what nobody serves in it may wait for one,
so that a run of 20 finds a twentieth too much at most, one of 2 half as much again.
"""
_WIDEST = 2.0**10
_WARM_UP = 0.1
_MOST_TURNS = 50
"""Judged of each open session on average: few of them, where a search begins, are soon judged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A way to serve. `router` changes keys of the cluster's router section; `colocated` takes all
    workers for both phases.
    """

    name: str
    what: str
    router: tuple[tuple[str, str | bool], ...] = ()
    colocated: bool = False


_PLAIN = (
    ("admission", "off"),
    ("local_prefill", False),
    ("requeue", False),
    ("decode_policy", "least_load"),
)
SYSTEMS = {
    system.name: system
    for system in (
        System(name="baton", what="the router section as it is"),
        System(
            name="colocated-least-load",
            what="chunked prefill beside decodes, fewest queued tokens",
            router=(*_PLAIN, ("prefill_policy", "least_load")),
            colocated=True,
        ),
        System(
            name="colocated-prefix",
            what="chunked prefill beside decodes, prefix affinity as in SGLang's gateway",
            router=(*_PLAIN, ("prefill_policy", "prefix_affinity")),
            colocated=True,
        ),
        System(
            name="dynamo",
            what="disaggregated, with the cost of Dynamo's router",
            router=(*_PLAIN, ("prefill_policy", "dynamo_cost")),
        ),
        System(
            name="distserve",
            what="disaggregated, as DistServe: shortest prefill queue, least loaded decode worker",
            router=(*_PLAIN, ("prefill_policy", "least_load")),
        ),
        System(
            name="mooncake",
            what="disaggregated, with Mooncake's rule",
            router=(*_PLAIN, ("prefill_policy", "mooncake_ttft")),
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is searched: from `first_scale` in factors of `growth`, then `refine` halvings of the
    interval.
    """

    trace: str
    requests: int
    share: float = 0.9
    refine: int = 5
    first_scale: float = 1.0
    growth: float = 2.0
    max_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a search. One that had missed its share early was ended then: its attainment is
    what it could have reached at most. With closed sessions, `scale` (rounded) is how many at once.
    """

    scale: float
    rate_per_gpu_s: float
    attainment: float


@dataclass(frozen=True, slots=True)
class Found:
    """The best rate of one system at one seed, 0 if none keeps the share, and all that was run."""

    system: str
    seed: int
    rate_per_gpu_s: float
    points: tuple[Point, ...]
    at_least: bool = False
    """The search ended before a rate was too high."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One system over all seeds. `behind` is the paired difference to the best system's mean."""

    system: str
    goodput: Estimate
    behind: Estimate
    found: tuple[Found, ...]

    @property
    def is_tied(self) -> bool:
        """The difference to the best lies within its interval; without one, there is none."""
        return self.behind.mean <= (self.behind.half if isfinite(self.behind.half) else 0.0)

    @property
    def at_least(self) -> bool:
        """On some seed no rate tried was too high."""
        return any(one.at_least for one in self.found)


def choose_systems(names: Sequence[str]) -> list[System]:
    """By name; all without any. Raises InvalidRequest naming those there are."""
    for name in names:
        if name not in SYSTEMS:
            raise InvalidRequest(f"there is no system {name!r}; there is: {', '.join(SYSTEMS)}")
    return [SYSTEMS[name] for name in dict.fromkeys(names)] or list(SYSTEMS.values())


def settings_of(system: System, settings: Settings) -> Settings:
    """The cluster, run that way: the same workers, the same model. Colocated ones take as much of a
    prompt as fits into a step, as engines that do both.
    """
    router = RouterConfig.model_validate(settings.router.model_dump() | dict(system.router))
    if not system.colocated:
        return replace(settings, router=router)
    pools = settings.simulation.pools or (
        SimulatedPool(name="prefill", role="prefill", workers=settings.prefill_workers),
        SimulatedPool(name="decode", role="decode", workers=settings.decode_workers),
    )
    merged = tuple(
        pool.model_copy(update={"role": "colocated", "chunk_tokens": pool.step_tokens})
        for pool in pools
    )
    simulation = settings.simulation.model_copy(update={"pools": merged})
    engine = settings.engine.model_copy(update={"chunk_tokens": settings.engine.step_tokens})
    return replace(settings, router=router, simulation=simulation, engine=engine)


def recorded_rate_per_s(question: Question, seed: int) -> float:
    """Of open arrivals at a scale of 1. Raises BadTrace where all come at once."""
    requests = _asked(question, seed, 1.0).requests
    check_rate(question.trace, requests)
    return (len(requests) - 1) / (requests[-1].at_s - requests[0].at_s)


def run_once(settings: Settings, question: Question, seed: int, scale: float) -> Point:
    """One run at `scale` times the trace's rate; of closed sessions, with so many at once."""
    if settings.simulation.closed_sessions:
        return _run_closed(settings, question, seed, scale)
    workload = _asked(question, seed, scale)
    spec = build_spec(settings, workload.block_size, seed)
    counted = workload.requests[int(_WARM_UP * len(workload.requests)) :]
    misses = Misses(spec.slo, since_s=counted[0].at_s, counted=len(counted), share=question.share)
    cluster = Cluster(replace(spec, samples=0))
    outcome = cluster.run(workload.requests, enough=misses.note, late=misses.late)
    if not misses.too_many:
        misses.never_ended(len(workload.requests) - len(outcome.records))
    span_s = counted[-1].at_s - counted[0].at_s
    rate_per_s = len(counted) / span_s if span_s > 0 else 0.0
    return Point(scale, rate_per_s / spec.gpus, misses.share)


def _run_closed(settings: Settings, question: Question, seed: int, scale: float) -> Point:
    sessions = max(1, round(scale))
    judged = min(question.requests, _MOST_TURNS * sessions)
    shaping = Shaping(
        seed=seed,
        rate_scale=sessions / BEGIN_S,
        sessions=sessions_needed(sessions, judged, _mean_turns(question.trace)),
        max_prompt_tokens=question.max_prompt_tokens,
    )
    workload = load_workload(question.trace, shaping).workload
    spec = build_spec(settings, workload.block_size, seed)
    attained = run_sessions(spec, workload.requests, sessions, question.share, judged)
    return Point(scale, attained.rate_per_s / spec.gpus, attained.share)


@lru_cache(maxsize=4)
def _mean_turns(trace: str) -> float:
    turns = Counter(request.session for request in load_workload(trace).workload.requests)
    if "" in turns:
        raise InvalidRequest("simulation.closed_sessions: the trace has no sessions to close")
    return turns.total() / len(turns)


def _asked(question: Question, seed: int, scale: float) -> Workload:
    """The requests at that scale: of sessions only the starts are divided, so they are built anew;
    of all others every gap is.
    """
    base = _load(question.trace, question.requests, question.max_prompt_tokens, seed, 1.0)
    if any(request.session for request in base.requests):
        return _load(question.trace, question.requests, question.max_prompt_tokens, seed, scale)
    requests = tuple(replace(request, at_s=request.at_s / scale) for request in base.requests)
    return replace(base, requests=requests, horizon_s=base.horizon_s / scale)


@lru_cache(maxsize=4)
def _load(
    trace: str, requests: int, max_prompt_tokens: int | None, seed: int, scale: float
) -> Workload:
    """A trace is parsed once for all rates and systems of a seed in a process."""
    shaping = Shaping(
        seed=seed,
        rate_scale=scale,
        requests=requests,
        skip=seed * requests,
        max_prompt_tokens=max_prompt_tokens,
    )
    return load_workload(trace, shaping).workload


def search(system: System, settings: Settings, question: Question, seed: int) -> Found:
    """Raise (or lower) the rate until the share is missed (or kept), then halve the interval."""
    mine = settings_of(system, settings)
    points: list[Point] = []
    first, growth = question.first_scale, question.growth

    def keeps(scale: float) -> bool:
        points.append(run_once(mine, question, seed, scale))
        return points[-1].attainment >= question.share

    low, high = 0.0, first
    while high < _WIDEST * first and keeps(high):
        low, high = high, growth * high
    at_least = low > 0 and high >= _WIDEST * first
    while low == 0 and high > first / _WIDEST:
        high /= growth
        if keeps(high):
            low, high = high, growth * high
    for _ in range(question.refine if low and not at_least else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    kept = (p.rate_per_gpu_s for p in points if p.attainment >= question.share)
    rate = max(kept, default=0.0)  # with closed sessions more of them may be served slower
    return Found(system.name, seed, rate, tuple(sorted(points, key=lambda p: p.scale)), at_least)


def compare(
    systems: Sequence[System],
    settings: Settings,
    question: Question,
    seeds: Sequence[int],
    *,
    processes: int = 1,
    on_found: Callable[[Found], None] = lambda found: None,
) -> list[Standing]:
    """All systems on all seeds, best first. `on_found` hears of each search as it ends."""
    tasks = [(system, settings, question, seed) for seed in seeds for system in systems]
    found: list[Found] = []
    ended = starmap(search, tasks) if processes == 1 else run_all(search, tasks, processes)
    for one in ended:
        found.append(one)
        on_found(one)
    return rank(found)


def rank(found: Iterable[Found]) -> list[Standing]:
    """Best first, from one search per system and seed, in any order."""
    by_system: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda one: (one.system, one.seed)):
        by_system.setdefault(one.system, []).append(one)
    rates = {name: [one.rate_per_gpu_s for one in mine] for name, mine in by_system.items()}
    best = max(rates, key=lambda name: statistics.fmean(rates[name]))
    standings = [
        Standing(
            system=name,
            goodput=Estimate.of(mine),
            behind=Estimate.of([b - m for b, m in zip(rates[best], mine, strict=True)]),
            found=tuple(by_system[name]),
        )
        for name, mine in rates.items()
    ]
    return sorted(standings, key=lambda standing: -standing.goodput.mean)
