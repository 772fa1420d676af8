"""Row 18: KV kept for a time between the turns of an agent (Continuum, 2511.02230).

While an agent's tool runs, its KV is cached and nobody's: under memory pressure other prompts evict
it, and the next turn computes all of its context again. Continuum pins it for a time that it
chooses at the end of each turn from the durations F seen so far,

    t* = argmax F(t) (reload + queue) - share t      over t in {0} and the durations seen

with `reload` the prefill of the context, `queue` what a turn waits for on average, and `share` that
of the worker's KV. Against it: LRU, which is what Baton has, and a pin until the session's next
turn, which is told of the session's end. Pins hold blocks as leases do; where nothing can run for
want of memory the newest goes first.

Sessions are those of the trace, in closed loops; tools take an exponential time of mean 0.925 s
(the paper's mean on SWE-bench), as the traces recorded next to none.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right, insort
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import as_json, plot, ratio, seeds_of, show
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import NO_SLO, PLAIN
from core.estimate import Estimate
from engine.latency.base import LatencyModel, StepShape
from kv_transfer.config import TransferConfig
from router.config import RouterConfig
from simulator.cluster import Cluster
from simulator.job import Record
from simulator.keep import KeepPolicy
from simulator.profiles.load import load_profile
from simulator.spec import PoolRole, PoolSpec, SimSpec
from simulator.worker import WorkerSpec
from simulator.workload.build import Shaping
from simulator.workload.load import load_workload
from simulator.workload.records import trace_name
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TOOL_S = 0.925
_SEEN = 512
_SESSIONS = 16
"""Open at once."""
_GENERATIONS = 2
_BEGIN_S = 10.0
_AMPLE = 3.0
_LEAST_KV = 40_000
"""Tokens: the longest prompt fits."""
_GAIN = 1.1
_LOSS = 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Workers of one model. `split`: Baton's default on one prefill and one decode worker, with
    half of the KV each; else one worker that does both. `sizes`: of KV, by the mean context of all
    sessions open at once.
    """

    name: str
    model: str
    tensor_parallel: int
    split: bool = False
    sizes: tuple[float, ...] = (0.4, 1.0, 3.0)


CASES = (
    Case(name="8b", model="llama-3-8b", tensor_parallel=1),
    Case(name="70b", model="llama-3-70b", tensor_parallel=4),
    Case(
        name="70b, baton",
        model="llama-3-70b",
        tensor_parallel=4,
        split=True,
        sizes=(1.0,),
    ),
)


class TimeToLive:
    """Implements KeepPolicy: Continuum's choice. `reload_s` is the prefill of so many tokens."""

    def __init__(
        self, reload_s: Callable[[int], float], *, by_session: bool, queue: float = 1.0
    ) -> None:
        self.by_session = by_session
        self._queue = queue
        self._reload_s = reload_s
        self._pauses: list[float] = []
        self._order: deque[float] = deque()
        self._queue_s = 0.0
        self._ended = 0

    def returned(self, pause_s: float) -> None:
        insort(self._pauses, pause_s)
        self._order.append(pause_s)
        if len(self._order) > _SEEN:
            oldest = self._order.popleft()
            del self._pauses[bisect_right(self._pauses, oldest) - 1]

    def keep_s(self, request: SimRequest, memory_share: float, queue_s: float) -> float:
        self._ended += 1
        self._queue_s += (queue_s - self._queue_s) / min(self._ended, _SEEN)
        gain_s = self._reload_s(request.prompt_tokens) + self._queue * self._queue_s
        return choose_ttl_s(self._pauses, gain_s, memory_share)


def choose_ttl_s(pauses_s: Sequence[float], gain_s: float, memory_share: float) -> float:
    """Pure. `pauses_s` in order; 0 where no time pays."""
    count, best_s, best = len(pauses_s), 0.0, 0.0
    for i, pause_s in enumerate(pauses_s, start=1):
        worth = i / count * gain_s - memory_share * pause_s
        if worth > best:
            best_s, best = pause_s, worth
    return best_s


class Nothing:
    """Implements KeepPolicy: LRU, with the order alone."""

    by_session = True

    def returned(self, pause_s: float) -> None:
        pass

    def keep_s(self, request: SimRequest, memory_share: float, queue_s: float) -> float:
        return 0.0


class UntilNextTurn:
    """Implements KeepPolicy; knows how many turns each session has."""

    by_session = True

    def __init__(self, turns: Mapping[str, int]) -> None:
        self._left = dict(turns)

    def returned(self, pause_s: float) -> None:
        pass

    def keep_s(self, request: SimRequest, memory_share: float, queue_s: float) -> float:
        self._left[request.session] -= 1
        return inf if self._left[request.session] else 0.0


@dataclass(frozen=True, slots=True)
class Served:
    """Means of the sessions of one run: seconds from the first question to the last answer, and the
    share of prompt tokens that were cached.
    """

    session_s: float
    hit_share: float


def sessions_of(trace: Path, seed: int, count: int) -> tuple[int, list[SimRequest]]:
    """The trace's block size, and so many whole sessions, with pauses drawn anew."""
    shaping = Shaping(seed=seed, sessions=count, rate_scale=count / _GENERATIONS / _BEGIN_S)
    workload = load_workload(trace, shaping).workload
    random = Random(seed)
    return workload.block_size, [
        request
        if request.think_s is None
        else replace(request, think_s=random.expovariate(1 / _TOOL_S))
        for request in workload.requests
    ]


def prefill_s(latency: LatencyModel, tokens: int, step_tokens: int) -> float:
    """Of a prompt alone, in chunks."""
    starts = range(0, tokens, step_tokens)
    return sum(
        latency.step_s(StepShape([(start, min(tokens, start + step_tokens))])) for start in starts
    )


def policies(spec: SimSpec, requests: Sequence[SimRequest]) -> dict[str, KeepPolicy | None]:
    """What is compared; LRU keeps nothing on purpose."""
    worker = spec.pools[0].worker
    turns = Counter(request.session for request in requests)

    def reload_s(tokens: int) -> float:
        return prefill_s(worker.latency, tokens, worker.step_tokens)

    return {
        "lru": None,
        "lru, by session": Nothing(),
        "ttl": TimeToLive(reload_s, by_session=True),
        "ttl, reload alone": TimeToLive(reload_s, by_session=True, queue=0.0),
        "pinned": UntilNextTurn(turns),
    }


def spec_of(case: Case, latency: LatencyModel, block_size: int, kv_tokens: int) -> SimSpec:
    """The case, with so much KV in all."""
    worker = WorkerSpec(
        latency=latency,
        kv_blocks=kv_tokens // block_size // (2 if case.split else 1),
        block_size=block_size,
        step_tokens=512,
    )
    roles = (PoolRole.PREFILL, PoolRole.DECODE) if case.split else (PoolRole.COLOCATED,)
    baton = RouterConfig(admission="off", request_timeout_s=1e6)
    return SimSpec(
        pools=tuple(PoolSpec(name=r.value, role=r, workers=1, worker=worker) for r in roles),
        slo=NO_SLO,
        router=baton if case.split else PLAIN,
        transfer=TransferConfig(fetch=case.split),
        closed_sessions=True,
        sessions=_SESSIONS,
        samples=0,
    )


def serve(spec: SimSpec, requests: Sequence[SimRequest]) -> Served:
    """One run."""
    records = Cluster(spec).run(requests).records
    by_session: dict[str, list[Record]] = {}
    for record in records:
        by_session.setdefault(record.session, []).append(record)
    spans = [max(r.end_s for r in mine) - mine[0].at_s for mine in by_session.values()]
    prompts = sum(record.prompt_tokens for record in records)
    return Served(statistics.fmean(spans), sum(r.cached_tokens for r in records) / prompts)


def rate(case: Case, trace: Path, size: float, seed: int) -> dict[str, Served]:
    """All policies on the same sessions."""
    profile = load_profile("roofline:h100", model=case.model, tp=case.tensor_parallel)
    block_size, requests = sessions_of(trace, seed, _GENERATIONS * _SESSIONS)
    mean = statistics.fmean(r.prompt_tokens + r.output_tokens for r in requests)
    parts = 2 if case.split else 1
    kv_tokens = max(parts * _LEAST_KV, int(size * _SESSIONS * mean))
    spec = replace(spec_of(case, profile.latency, block_size, kv_tokens), seed=seed)
    return {
        name: serve(replace(spec, keep=policy), requests)
        for name, policy in policies(spec, requests).items()
    }


# -- the part -----------------------------------------------------------------------------------

_Results = dict[tuple[str, str, float], dict[str, list[Served]]]


def _run(run: Run) -> Finding:
    if not run.traces:
        missed = Target(promise="row 18 is run", measured="no --trace of sessions", held=False)
        note = "row 18 not run: it needs agent sessions, each as --trace FILE"
        return Finding(tables=(), targets=(missed,), notes=(note,))
    seeds = seeds_of(run.quick)
    cases = CASES[1:2] if run.quick else CASES
    found: _Results = {}
    total = sum(len(case.sizes) for case in cases) * len(run.traces) * len(seeds)
    for case in cases:
        for trace in run.traces:
            for size in case.sizes:
                mine = found[case.name, trace_name(trace), size] = {}
                for seed in seeds:
                    done = sum(len(next(iter(r.values()), [])) for r in found.values())
                    run.progress(f"{case.name}, {size:g} of the KV", done, total)
                    for name, served in rate(case, trace, size, seed).items():
                        mine.setdefault(name, []).append(served)
    return Finding(
        tables=tuple(
            _table(case, trace_name(trace), found) for case in cases for trace in run.traces
        ),
        targets=tuple(_targets(found)),
        notes=("Published: latency 1.12 to 3.66 times better (Continuum, on real GPUs).",),
        keys={"row_18": _json(found)},
        draw=lambda axes: _draw(axes, found),
    )


def gain(served: Mapping[str, Sequence[Served]], name: str) -> Estimate:
    """How many times longer sessions take with LRU, seed by seed."""
    mine = [one.session_s for one in served[name]]
    return ratio([one.session_s for one in served["lru"]], mine)


def _targets(found: _Results) -> Iterator[Target]:
    gains = {where: gain(served, "ttl") for where, served in found.items()}
    pressed = [one for (_, _, size), one in gains.items() if size < _AMPLE]
    ample = [one for (_, _, size), one in gains.items() if size >= _AMPLE]
    yield Target(
        promise=f"simulated: at memory pressure sessions take {_GAIN:g} times longer without TTL",
        measured=f"from {min(e.mean for e in pressed):.2f} to"
        f" {max(e.mean for e in pressed):.2f} times",
        held=min(e.mean for e in pressed) >= _GAIN,
    )
    yield Target(
        promise="simulated: with ample memory TTL loses nothing",
        measured=f"at least {min(e.mean for e in ample):.3f} times",
        held=min(e.mean for e in ample) >= _LOSS,
    )


def _table(case: Case, trace: str, found: _Results) -> ResultTable:
    names = list(found[case.name, trace, case.sizes[0]])
    return ResultTable(
        title=f"simulated: row 18, {case.name}, {trace}: session time with LRU by that with",
        columns=("KV / open contexts", "lru, s", *names[1:], "cached: lru", "ttl"),
        texts=1,
        rows=tuple(
            (
                f"{size:g}",
                show(Estimate.of([s.session_s for s in served["lru"]]), 1),
                *(show(gain(served, name)) for name in names[1:]),
                *(f"{statistics.fmean(s.hit_share for s in served[n]):.0%}" for n in _SHOWN),
            )
            for size in case.sizes
            for served in [found[case.name, trace, size]]
        ),
    )


_SHOWN = ("lru", "ttl")


def _json(found: _Results) -> Json:
    return {
        f"{case} / {trace} / {size:g}": {
            "simulated": True,
            "session_s": {
                name: as_json(Estimate.of([s.session_s for s in mine]))
                for name, mine in served.items()
            },
            "gain": {name: as_json(gain(served, name)) for name in served},
            "hit_share": {
                name: statistics.fmean(s.hit_share for s in mine) for name, mine in served.items()
            },
        }
        for (case, trace, size), served in found.items()
    }


def _draw(axes: Axes, found: _Results) -> None:
    for case, trace in dict.fromkeys((case, trace) for case, trace, _ in found):
        points = [(s, gain(v, "ttl")) for (c, t, s), v in found.items() if (c, t) == (case, trace)]
        sizes, gains = zip(*points, strict=True)
        plot(axes, sizes, gains, marker="o", label=f"{case}, {trace}")
    axes.axhline(1.0, color="gray", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("KV by the contexts of open sessions")
    axes.set_ylabel("session time: LRU by TTL")
    axes.set_title("row 18, simulated")
    axes.legend(fontsize=7)


PART = Part(
    name="ttl",
    what="row 18: KV kept between an agent's turns, for a time or until the next, against LRU",
    keys=("row_18",),
    run=_run,
)
