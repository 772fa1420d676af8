"""Row 4: the order of Mooncake's schedulers by mean TTFT (FAST'25, its figure of the scheduler).

    published, conversation trace, 16 nodes: global cache 3.07 s < local cache 3.58 s
                                             < load balance 5.27 s < random 19.65 s

Its local-cache scheduler is the policy `mooncake_ttft`: the least predicted TTFT of all, counting
what each holds. Its global one may also copy a prefix from another node before it computes; here
the worker decides on that by the same rule (prefill_worker/sources.py), after the policy has placed
the prompt, so the time of a copy is not part of the choice.

Sixteen prefill instances of eight A800 with a 70B model take what its own cost formula says,
l (4 n^2 d + 22 n d^2) FLOP, at 0.6 of the datasheet (assumed); each remembers 3 M tokens of 320 KB,
its 1 TB of memory, and moves 87 GB/s, what its transfer engine reached. Nothing decodes. Load is
the prompts' work without any cache by what the instances can do: the paper does not give its rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import as_json, difference, plot, seeds_of, show
from benchmarks.reproduce.windows import (
    BLOCK,
    CONVERSATION,
    at_load,
    find_trace,
    prompts_alone,
    trace_title,
    window_of,
)
from benchmarks.routing.lru import hit_share
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import PLAIN, Workers, make_worker, run_cluster
from core.estimate import Estimate
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from router.config import PrefillPolicyName
from router.policies.base import Slo
from simulator.job import Record
from simulator.spec import PoolRole
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORKERS = 16
_LAYERS, _WIDTH = 80, 8192
_FLOPS_PER_S = 0.6 * 8 * 312e12
LATENCY = FittedLatency(
    prefill=PrefillCurve(
        base_s=2e-3,
        per_token_s=22 * _LAYERS * _WIDTH**2 / _FLOPS_PER_S,
        per_pair_s=2 * 4 * _LAYERS * _WIDTH / _FLOPS_PER_S,
    ),
    decode=(DecodeCurve(base_s=20e-3),),
)
_WORKER = make_worker(
    LATENCY,
    kv_tokens=3_000_000,
    block_size=BLOCK,
    step_tokens=2048,
    max_running=4,
    kv_bytes_per_token=327_680,
    link_bytes_per_s=87e9,
)
_SLO = Slo(ttft_s=30.0, tpot_s=1.0)
"""Mooncake's TTFT target."""
_LOADS = (0.6, 0.9, 1.2)
_REQUESTS, _QUICK_REQUESTS = 2400, 400
_WARM_UP = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A policy; `fetch`: workers copy prefixes from each other. `published`: mean TTFT, s."""

    policy: PrefillPolicyName
    fetch: bool = False
    published: str = ""

    @property
    def name(self) -> str:
        return f"{self.policy}, fetching" if self.fetch else self.policy


ORDER = (
    System(policy="mooncake_ttft", fetch=True, published="3.07"),
    System(policy="mooncake_ttft", published="3.58"),
    System(policy="least_load", published="5.27"),
    System(policy="random", published="19.65"),
)
"""The paper's, best first."""
OURS = (System(policy="baton", fetch=True), System(policy="baton"))
SYSTEMS = (*ORDER, *OURS)


def serve(requests: Sequence[SimRequest], system: System, seed: int) -> tuple[Record, ...]:
    """What became of the prompts after the warm-up."""
    records = run_cluster(
        requests,
        [Workers(PoolRole.PREFILL, _WORKERS, _WORKER), Workers(PoolRole.DECODE, 1, _WORKER)],
        slo=_SLO,
        router=PLAIN.model_copy(update={"prefill_policy": system.policy}),
        fetch=system.fetch,
        max_tokens=1,
        seed=seed,
    ).records
    return records[int(_WARM_UP * len(records)) :]


# -- the part -----------------------------------------------------------------------------------

_Found = dict[tuple[float, System], list["Fare"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fare:
    """Of one run: the mean, and the share of tokens that were cached."""

    ttft_s: float
    hit_share: float
    ideal_share: float
    """What one endless cache would have had of the same prompts."""


def fare(
    trace: Path | None, load: float, system: System, seed: int, count: int = _REQUESTS
) -> Fare:
    """One system, one window of the trace, one load."""
    window = prompts_alone(window_of(trace, seed, count))
    records = serve(at_load(window, load, _WORKERS, LATENCY), system, seed)
    return Fare(
        ttft_s=fmean(record.ttft_s for record in records),
        hit_share=sum(r.cached_tokens for r in records) / sum(r.prompt_tokens for r in records),
        ideal_share=hit_share(
            [(r.prompt_tokens, r.hashes) for r in window], None, skip=int(_WARM_UP * len(window))
        ),
    )


def _run(run: Run) -> Finding:
    seeds, trace = seeds_of(run.quick), find_trace(run, CONVERSATION)
    loads = _LOADS[1:2] if run.quick else _LOADS
    count = _QUICK_REQUESTS if run.quick else _REQUESTS
    found: _Found = {}
    for i, (load, system) in enumerate(product(loads, SYSTEMS)):
        run.progress(f"load {load:g}, {system.name}", i, len(loads) * len(SYSTEMS))
        found[load, system] = [fare(trace, load, system, seed, count) for seed in seeds]
    return Finding(
        tables=(_table(found, loads, trace),),
        targets=(
            *(_order_target(found, load, pair) for load in loads for pair in pairwise(ORDER)),
            *(_our_target(found, load, ours) for load, ours in product(loads, OURS)),
        ),
        notes=(
            f"{count} prompts per seed, the first fifth does not count; behind: baton's mean TTFT"
            " less the system's, both fetching or neither, paired by seed",
        ),
        keys={
            "row_04": {
                f"load {load:g}": {one.name: _json(found[load, one]) for one in SYSTEMS}
                for load in loads
            }
        },
        draw=lambda axes: _draw(axes, found, loads),
    )


def _ttfts(fares: Sequence[Fare]) -> list[float]:
    return [one.ttft_s for one in fares]


def _table(found: _Found, loads: Sequence[float], trace: Path | None) -> ResultTable:
    rows = []
    for (load, system), fares in found.items():
        baton = next(one for one in OURS if one.fetch == system.fetch)
        ours = difference(_ttfts(found[load, baton]), _ttfts(fares))
        rows.append(
            (
                f"{load:g}",
                system.name,
                show(Estimate.of(_ttfts(fares))),
                "" if system in OURS else show(ours),
                f"{100 * fmean(f.hit_share for f in fares):.1f}",
                f"{100 * fmean(f.ideal_share for f in fares):.1f}",
                system.published,
            )
        )
    return ResultTable(
        title=f"simulated: row 4, {trace_title(trace)}, {_WORKERS} prefill instances",
        columns=("load", "system", "mean TTFT, s", "baton behind, s", "hit %", "ideal", "paper, s"),
        texts=2,
        rows=tuple(rows),
    )


def _order_target(found: _Found, load: float, pair: tuple[System, System]) -> Target:
    better, worse = pair
    gap = difference(_ttfts(found[load, worse]), _ttfts(found[load, better]))
    return Target(
        promise=f"simulated, load {load:g}: {better.name} has a lower mean TTFT than {worse.name}",
        measured=f"by {show(gap, 3)} s",
        held=gap.low > 0,
    )


def _our_target(found: _Found, load: float, ours: System) -> Target:
    others = [one for one in ORDER if one.fetch == ours.fetch]
    best = min(others, key=lambda one: fmean(_ttfts(found[load, one])))
    behind = difference(_ttfts(found[load, ours]), _ttfts(found[load, best]))
    return Target(
        promise=f"simulated, load {load:g}: {ours.name} has the lowest mean TTFT, or ties",
        measured=f"{show(behind, 3)} s behind {best.name}",
        held=behind.low <= 0,
    )


def _json(fares: Sequence[Fare]) -> dict[str, Json]:
    return {
        "simulated": True,
        "ttft_mean_s": as_json(Estimate.of(_ttfts(fares))),
        "ttft_mean_s_by_seed": [round(one.ttft_s, 4) for one in fares],
        "hit_share": as_json(Estimate.of([one.hit_share for one in fares])),
        "ideal_share": fmean(one.ideal_share for one in fares),
    }


def _draw(axes: Axes, found: _Found, loads: Sequence[float]) -> None:
    for system in SYSTEMS:
        means = [Estimate.of(_ttfts(found[load, system])) for load in loads]
        plot(axes, loads, means, marker="o", label=system.name)
    axes.set_yscale("log")
    axes.set_xlabel("load, without any cache")
    axes.set_ylabel("mean TTFT, s")
    axes.set_title("row 4, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="schedulers",
    what="row 4: Mooncake's order of schedulers by mean TTFT, and the default among them",
    keys=("row_04",),
    run=_run,
)
