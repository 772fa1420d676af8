"""Row 5: what a cache of a given size remembers of the conversation trace, in one pool or in parts
(Mooncake, FAST'25).

    published    3 M tokens on one node reach less than half of the most there is, 50 M about all;
                 a global cache has 2.22, 1.38 and 2.36 times the hits of local ones (three traces)

An LRU without time gives the curve: leading blocks only, the tail of a prompt forgotten before its
head. The same tokens are then split over eight workers, with prompts placed at random and, in the
replay of `baton bench routing` at half of what workers can compute, by the default policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypeVar

from benchmarks.reproduce.cases import as_json, ratio, seeds_of, show
from benchmarks.reproduce.windows import BLOCK, CONVERSATION, find_trace, trace_title, window_of
from benchmarks.routing.lru import hit_share
from benchmarks.routing.replay import ASCEND, Replay, World
from benchmarks.routing.study import OURS, Entrant
from benchmarks.routing.traces import Prompt
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from core.estimate import Estimate
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

S = TypeVar("S")

_WORKERS = 8
_SIZES = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 50_000_000)
_PLACED = (3_000_000, 10_000_000, 30_000_000)
_PUBLISHED = {1_000_000: 5.0, 3_000_000: 14.0, 10_000_000: 29.0, 30_000_000: 36.0}
"""Per cent: counted on the same trace by another program (leading blocks, one endless cache: 36.6 %
of blocks, 37.4 % of tokens)."""
_NEAR = 1.0
"""Points."""
_LOAD = 0.5
_EVERYTHING, _QUICK_REQUESTS = 12_031, 1200


@dataclass(frozen=True, slots=True, kw_only=True)
class Hits:
    """Shares of tokens by total size; None is endless."""

    pooled: dict[int | None, float]
    scattered: dict[int | None, float]
    placed: dict[int, float]


def hits_of(trace: Path | None, seed: int, count: int, placed: Sequence[int]) -> Hits:
    """All sizes, one seed."""
    requests = window_of(trace, seed, count)
    asked = [(request.prompt_tokens, request.hashes) for request in requests]
    random = Random(seed)
    places = [random.randrange(_WORKERS) for _ in requests]
    sizes: tuple[int | None, ...] = (*_SIZES, None)
    return Hits(
        pooled={size: hit_share(asked, _blocks(size)) for size in sizes},
        scattered={
            size: hit_share(asked, _blocks(size, _WORKERS), places=places) for size in sizes
        },
        placed={size: _by_policy(requests, size, seed) for size in placed},
    )


def _blocks(size: int | None, parts: int = 1) -> int | None:
    return None if size is None else size // BLOCK // parts


def _by_policy(requests: Sequence[SimRequest], size: int, seed: int) -> float:
    world = World(
        workers=_WORKERS, block_size=BLOCK, cache_tokens=size // _WORKERS, curve=ASCEND, warm_up=0
    )
    prompts = [Prompt(r.at_s, r.prompt_tokens, r.hashes) for r in requests]
    rate = world.rate_at(_LOAD, prompts)
    policy = Entrant(name=OURS, policy=OURS).build
    return Replay(world, policy, seed, rate).run(prompts).hit_rate


# -- the part -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curves:
    """Per cent of tokens by total size, a value per seed."""

    pooled: dict[int | None, list[float]]
    scattered: dict[int | None, list[float]]
    placed: dict[int, list[float]]


def _run(run: Run) -> Finding:
    seeds, trace = seeds_of(run.quick), find_trace(run, CONVERSATION)
    count = _EVERYTHING if trace is not None and not run.quick else _QUICK_REQUESTS
    found: list[Hits] = []
    for seed in seeds:
        run.progress(f"seed {seed}", seed, len(seeds))
        found.append(hits_of(trace, seed, count, _PLACED[1:2] if run.quick else _PLACED))
    curves = _Curves(
        pooled=_by_size([hits.pooled for hits in found]),
        scattered=_by_size([hits.scattered for hits in found]),
        placed=_by_size([hits.placed for hits in found]),
    )
    is_whole = count == _EVERYTHING
    return Finding(
        tables=(_table(curves, trace, count),),
        targets=(*(_curve_targets(curves) if is_whole else ()), *_spread_targets(curves)),
        notes=(
            f"hits in % of tokens; +- over seeds, which draw the times within the trace's buckets"
            f" and where prompts go; local: {_WORKERS} workers, an eighth of the tokens each",
        ),
        keys={"row_05": {_name(size): _json(curves, size) for size in curves.pooled}},
        draw=lambda axes: _draw(axes, curves),
    )


def _by_size(found: Sequence[Mapping[S, float]]) -> dict[S, list[float]]:
    return {size: [100 * hits[size] for hits in found] for size in found[0]}


def _name(size: int | None) -> str:
    return "endless" if size is None else f"{size // 1_000_000} M"


def _table(curves: _Curves, trace: Path | None, count: int) -> ResultTable:
    return ResultTable(
        title=f"simulated: row 5, {trace_title(trace)}, {count} requests",
        columns=("tokens", "one pool, %", "traces", "local, random", "pool / it", "local, baton"),
        texts=1,
        rows=tuple(
            (
                _name(size),
                show(Estimate.of(pooled), 1),
                f"{_PUBLISHED[size]:g}" if size in _PUBLISHED else "",
                show(Estimate.of(curves.scattered[size]), 1),
                show(ratio(pooled, curves.scattered[size])),
                show(Estimate.of(curves.placed[size]), 1) if size in curves.placed else "",
            )
            for size, pooled in curves.pooled.items()
        ),
    )


def _curve_targets(curves: _Curves) -> list[Target]:
    """Against what was counted before, and against the paper's two sizes."""
    worst = max(_PUBLISHED, key=lambda size: abs(_mean(curves.pooled[size]) - _PUBLISHED[size]))
    off = _mean(curves.pooled[worst]) - _PUBLISHED[worst]
    most = _mean(curves.pooled[None])
    small, large = _mean(curves.pooled[3_000_000]), _mean(curves.pooled[50_000_000])
    return [
        Target(
            promise=f"simulated: the curve counted before, within {_NEAR:g} point",
            measured=f"{off:+.1f} at {_name(worst)}",
            held=abs(off) <= _NEAR,
        ),
        Target(
            promise="simulated: 3 M tokens reach less than half of the most, 50 M nearly all",
            measured=f"{small / most:.2f} and {large / most:.2f} of {most:.1f} %",
            held=small < most / 2 and large > 0.95 * most,
        ),
    ]


def _spread_targets(curves: _Curves) -> list[Target]:
    targets = []
    for size, placed in curves.placed.items():
        gain = ratio(placed, curves.scattered[size])
        targets.append(
            Target(
                promise=f"simulated, {_name(size)}: baton's placement hits more than a random one",
                measured=f"{show(gain)} times, {_mean(placed) / _mean(curves.pooled[size]):.2f}"
                " of one pool",
                held=gain.low > 1,
            )
        )
    return targets


def _mean(values: Sequence[float]) -> float:
    return Estimate.of(values).mean


def _json(curves: _Curves, size: int | None) -> dict[str, Json]:
    placed = curves.placed.get(size) if size is not None else None
    return {
        "simulated": True,
        "pooled_percent": as_json(Estimate.of(curves.pooled[size])),
        "local_random_percent": as_json(Estimate.of(curves.scattered[size])),
        "local_baton_percent": None if placed is None else as_json(Estimate.of(placed)),
    }


def _draw(axes: Axes, curves: _Curves) -> None:
    sizes = [size / 1e6 for size in _SIZES]
    axes.plot(sizes, [_mean(curves.pooled[s]) for s in _SIZES], marker="o", label="one pool")
    axes.plot(
        sizes, [_mean(curves.scattered[s]) for s in _SIZES], marker="o", label="local, random"
    )
    axes.plot(
        [size / 1e6 for size in curves.placed],
        [_mean(hits) for hits in curves.placed.values()],
        marker="s",
        label="local, baton",
    )
    axes.axhline(_mean(curves.pooled[None]), color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("million tokens, all workers")
    axes.set_ylabel("hits, % of tokens")
    axes.set_title("row 5, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="cache_size",
    what="row 5: hits by cache size, one pool against local caches, Mooncake's conversation trace",
    keys=("row_05",),
    run=_run,
)
