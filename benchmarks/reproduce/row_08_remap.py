"""Row 8: which keys lose their workers when four workers become eight, or five (DualMap, ICLR'26).

DualMap hashes a key onto two rings, so that a key whose one home changes still has the other; it
published that about 1/n of the keys of a ring change with a worker. Against it stand one home on
one ring, and the hash modulo n. The rings are the router's own (router/policies/ring.py).

Then the same in a replay of the conversation trace: four workers, from its middle on more, 0.7 of
what they can compute asked of the four. A worker that comes is empty, so some prefixes have to be
computed again; modulo and one ring place by key alone, whatever waits there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import as_json, difference, percent, plot, seeds_of, show
from benchmarks.reproduce.windows import BLOCK, CONVERSATION, find_trace, trace_title, window_of
from benchmarks.routing.replay import Replay, World
from benchmarks.routing.study import Entrant
from benchmarks.routing.traces import CUT_TOKENS, Prompt
from benchmarks.routing.worker import Job
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from core.estimate import Estimate
from core.ids import BlockHash, WorkerId
from router.policies.base import Decision, PrefillPolicy, PrefillQuery
from router.policies.hotness import HotnessTree
from router.policies.ring import TwoRings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GROWTHS = ((4, 5), (4, 8), (8, 9), (8, 16))
_BEFORE, _AFTER = 4, (5, 8)
_SPANS = 3
_KEYS, _QUICK_KEYS = 20_000, 2000
_REQUESTS, _QUICK_REQUESTS = 2400, 600
_LOAD = 0.7
_SPAN_S = 60.0
Homes = Callable[[BlockHash], Sequence[WorkerId]]


def _any(worker: WorkerId) -> bool:
    return True


def modulo(workers: Sequence[WorkerId]) -> Homes:
    """One home: the hash modulo their number."""
    return lambda key: (workers[int.from_bytes(key) % len(workers)],)


def one_ring(workers: Sequence[WorkerId]) -> Homes:
    """One home: the first of the two rings."""
    rings = _rings(workers)
    return lambda key: rings.homes(key, _any)[:1]


def two_rings(workers: Sequence[WorkerId]) -> Homes:
    """Two homes, as DualMap and the default have them."""
    rings = _rings(workers)
    return lambda key: rings.homes(key, _any)


def _rings(workers: Sequence[WorkerId]) -> TwoRings:
    rings = TwoRings()
    rings.follow(workers)
    return rings


SCHEMES = {"modulo": modulo, "one ring": one_ring, "two rings": two_rings}


def lost_shares(
    scheme: Callable[[Sequence[WorkerId]], Homes], before: int, after: int, seed: int, keys: int
) -> tuple[float, float]:
    """Of the keys, those that lose a home, and those that lose all they had."""
    names = [WorkerId(f"{seed}-{i:03d}") for i in range(after)]
    old, new = scheme(names[:before]), scheme(names)
    some = every = 0
    for i in range(keys):
        key = BlockHash(blake2b(f"{seed}/{i}".encode(), digest_size=16).digest())
        had, has = set(old(key)), set(new(key))
        some += not had <= has
        every += not had & has
    return some / keys, every / keys


class ByKey:
    """Implements router.policies.base.PrefillPolicy: the first home of the prompt's key."""

    def __init__(self, scheme: Callable[[Sequence[WorkerId]], Homes]) -> None:
        self._scheme = scheme
        self._pool: Sequence[WorkerId] = ()
        self._hotness = HotnessTree()
        self._homes: Homes = modulo(())

    def choose(self, query: PrefillQuery) -> Decision:
        if query.pool is not self._pool:
            self._pool, self._homes = query.pool, self._scheme(query.pool)
        key = self._hotness.key(query)
        home = query.pool[0] if key is None else self._homes(key)[0]
        return Decision(home, (), "key")

    def placed(self, query: PrefillQuery, decision: Decision) -> None:
        self._hotness.saw(query)


SYSTEMS: dict[str, Callable[[], PrefillPolicy]] = {
    "modulo": partial(ByKey, modulo),
    "one ring": partial(ByKey, one_ring),
    "dualmap": Entrant(name="dualmap", policy="dualmap").build,
    "baton": Entrant(name="baton", policy="baton").build,
}
"""None of them moves prompts that wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """Means of the prompts that came in the minute before the workers did, and in those after."""

    ttft_s: tuple[float, ...]
    hit_share: tuple[float, ...]


def scale_out(trace: Path | None, system: str, after: int, seed: int, count: int) -> Spike:
    """One replay, from four workers to so many at its middle."""
    requests = window_of(trace, seed, count)
    cut = CUT_TOKENS // BLOCK
    prompts = [Prompt(r.at_s, min(r.prompt_tokens, CUT_TOKENS), r.hashes[:cut]) for r in requests]
    world = World(workers=_BEFORE, block_size=BLOCK, cache_tokens=1_000_000, warm_up=0)
    rate = world.rate_at(_LOAD, prompts)
    at_s = prompts[count // 2].at_s / rate
    replay = Replay(replace(world, joins=after - _BEFORE, join_s=at_s), SYSTEMS[system], seed, rate)
    replay.run(prompts)
    return spike_of(replay.done, at_s)


def spike_of(jobs: Sequence[Job], at_s: float) -> Spike:
    """One minute before, and two after."""
    spans = [
        [job for job in jobs if begin_s <= job.at_s - at_s < begin_s + _SPAN_S]
        for begin_s in (-_SPAN_S, 0.0, _SPAN_S)
    ]
    return Spike(
        ttft_s=tuple(fmean(job.ends_s - job.at_s for job in span) for span in spans),
        hit_share=tuple(
            sum(job.hit_tokens for job in span) / sum(job.prompt.tokens for job in span)
            for span in spans
        ),
    )


# -- the part -----------------------------------------------------------------------------------

_Lost = dict[tuple[str, int, int], list[tuple[float, float]]]
_Spikes = dict[tuple[int, str], list[Spike]]


def _run(run: Run) -> Finding:
    seeds, trace = seeds_of(run.quick), find_trace(run, CONVERSATION)
    keys, count = (_QUICK_KEYS, _QUICK_REQUESTS) if run.quick else (_KEYS, _REQUESTS)
    lost: _Lost = {
        (name, before, after): [lost_shares(scheme, before, after, seed, keys) for seed in seeds]
        for (before, after), (name, scheme) in product(_GROWTHS, SCHEMES.items())
    }
    spikes: _Spikes = {}
    for i, (after, system) in enumerate(product(_AFTER, SYSTEMS)):
        run.progress(f"{_BEFORE} to {after} workers, {system}", i, len(_AFTER) * len(SYSTEMS))
        spikes[after, system] = [scale_out(trace, system, after, seed, count) for seed in seeds]
    return Finding(
        tables=(_lost_table(lost, keys), _spike_table(spikes, trace)),
        targets=(*_lost_targets(lost), *_spike_targets(spikes)),
        notes=(
            "of modulo and one ring a key has one home, so whoever loses some loses all",
            f"{count} prompts, minutes of {_SPAN_S:g} s; {_LOAD:g} of what {_BEFORE} workers can"
            " compute, prompts cut to 20,480 tokens",
        ),
        keys={"row_08": _json(lost, spikes)},
        draw=lambda axes: _draw(axes, spikes),
    )


def _percent(values: Sequence[float]) -> str:
    return show(percent(values), 1)


def _lost_table(lost: _Lost, keys: int) -> ResultTable:
    return ResultTable(
        title=f"row 8: % of {keys:,} keys that lose their workers",
        columns=("workers", "homes", "lose one or more", "lose all", "2/n"),
        texts=2,
        rows=tuple(
            (
                f"{before} to {after}",
                name,
                _percent([some for some, _ in shares]),
                _percent([every for _, every in shares]),
                f"{200 / after:.1f}",
            )
            for (name, before, after), shares in lost.items()
        ),
    )


def _spike_table(spikes: _Spikes, trace: Path | None) -> ResultTable:
    rows = []
    for (after, system), found in spikes.items():
        ttfts = [show(Estimate.of([s.ttft_s[i] for s in found])) for i in range(_SPANS)]
        hits = [_percent([s.hit_share[i] for s in found]) for i in range(_SPANS)]
        rows.append((f"{_BEFORE} to {after}", system, *ttfts, *hits))
    spans = ("before", "1st min", "2nd min")
    return ResultTable(
        title=f"simulated: row 8, {trace_title(trace)}, before and after workers came",
        columns=(
            "workers",
            "system",
            *(f"TTFT {span}, s" for span in spans),
            *(f"hit % {span}" for span in spans),
        ),
        texts=2,
        rows=tuple(rows),
    )


def _lost_targets(lost: _Lost) -> list[Target]:
    targets = []
    for before, after in _GROWTHS:
        every = Estimate.of([share for _, share in lost["two rings", before, after]])
        targets.append(
            Target(
                promise=f"{before} to {after} workers: at most 2/n of the keys lose both homes",
                measured=f"{show(every, 3)}, 2/n = {2 / after:.3f}",
                held=every.mean <= 2 / after,
            )
        )
    return targets


def _spike_targets(spikes: _Spikes) -> list[Target]:
    """In the first minute, seed by seed."""
    targets = []
    for after, mine, other in product(_AFTER, ("dualmap", "baton"), ("modulo", "one ring")):
        gap = difference(_kept_hits(spikes[after, mine]), _kept_hits(spikes[after, other]))
        targets.append(
            Target(
                promise=f"simulated, {_BEFORE} to {after}: {mine} loses fewer hits in the first"
                f" minute than {other}",
                measured=f"{show(gap, 1)} points",
                held=gap.low > 0,
            )
        )
    return targets


def _kept_hits(found: Sequence[Spike]) -> list[float]:
    """Points of hits in the first minute less those before."""
    return [100 * (spike.hit_share[1] - spike.hit_share[0]) for spike in found]


def _json(lost: _Lost, spikes: _Spikes) -> dict[str, Json]:
    keys: dict[str, Json] = {
        f"{name}, {before} to {after}": {
            "lose_one_share": as_json(Estimate.of([some for some, _ in shares])),
            "lose_all_share": as_json(Estimate.of([every for _, every in shares])),
        }
        for (name, before, after), shares in lost.items()
    }
    replays: dict[str, Json] = {
        f"{system}, {_BEFORE} to {after}": {
            "simulated": True,
            "ttft_s_by_minute": [
                as_json(Estimate.of([s.ttft_s[i] for s in found])) for i in range(_SPANS)
            ],
            "hit_share_by_minute": [
                as_json(Estimate.of([s.hit_share[i] for s in found])) for i in range(_SPANS)
            ],
        }
        for (after, system), found in spikes.items()
    }
    return {"keys": keys, "replays": replays}


def _draw(axes: Axes, spikes: _Spikes) -> None:
    for (after, system), found in spikes.items():
        plot(
            axes,
            ["before", "1st minute", "2nd minute"],
            [percent([s.hit_share[i] for s in found]) for i in range(_SPANS)],
            marker="o",
            capsize=3,
            linestyle="--" if after == _AFTER[0] else "-",
            label=f"{system}, {_BEFORE} to {after}",
        )
    axes.set(ylabel="hits, % of tokens", title="row 8, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="remap",
    what="row 8: keys that lose their workers when some come, and what it does to TTFT",
    keys=("row_08",),
    run=_run,
)
