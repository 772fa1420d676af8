"""Row 4: the order of Mooncake's schedulers by mean TTFT (FAST'25, its figure of the scheduler).

    published, conversation trace, 16 nodes: global cache 3.07 s < local cache 3.58 s
                                             < load balance 5.27 s < random 19.65 s

Its local-cache scheduler is the policy `mooncake_ttft`: the least predicted TTFT of all, counting
what each holds. Its global one also copies prefixes between nodes; a simulated worker does not, so
that one is not here. Sixteen prefill instances of eight A800 with a 70B model take what its own
cost formula says, l (4 n^2 d + 22 n d^2) FLOP, at 0.6 of the datasheet (assumed); each remembers
3 M tokens, its 1 TB of memory. Nothing decodes. Load is the prompts' work without any cache by what
the instances can do: the paper does not give its rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.numbers import Estimate
from benchmarks.reproduce.cases import as_json, difference, seeds_of, show
from benchmarks.reproduce.lru import hit_share
from benchmarks.reproduce.windows import (
    BLOCK,
    CONVERSATION,
    at_load,
    find_trace,
    prompts_alone,
    trace_title,
    window_of,
)
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import PLAIN, Workers, make_worker, run_cluster
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
    LATENCY, kv_tokens=3_000_000, block_size=BLOCK, step_tokens=2048, max_running=4
)
_SLO = Slo(ttft_s=30.0, tpot_s=1.0)
"""Mooncake's TTFT target."""
OURS: PrefillPolicyName = "baton"
POLICIES: tuple[PrefillPolicyName, ...] = ("mooncake_ttft", "least_load", "random", OURS)
_ORDER = ("mooncake_ttft", "least_load", "random")
_PUBLISHED = {"mooncake_ttft": "3.58", "least_load": "5.27", "random": "19.65"}
_LOADS = (0.6, 0.9, 1.2)
_REQUESTS, _QUICK_REQUESTS = 2400, 400
_WARM_UP = 0.2


def serve(
    requests: Sequence[SimRequest], policy: PrefillPolicyName, seed: int
) -> tuple[Record, ...]:
    """What became of the prompts after the warm-up."""
    records = run_cluster(
        requests,
        [Workers(PoolRole.PREFILL, _WORKERS, _WORKER)],
        slo=_SLO,
        router=PLAIN.model_copy(update={"prefill_policy": policy}),
        max_tokens=1,
        seed=seed,
    ).records
    return records[int(_WARM_UP * len(records)) :]


# -- the part -----------------------------------------------------------------------------------

_Found = dict[tuple[float, str], list["Fare"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fare:
    """Of one run: the mean, and the share of tokens that were cached."""

    ttft_s: float
    hit_share: float
    ideal_share: float
    """What one endless cache would have had of the same prompts."""


def fare(
    trace: Path | None, load: float, policy: PrefillPolicyName, seed: int, count: int = _REQUESTS
) -> Fare:
    """One system, one window of the trace, one load."""
    window = prompts_alone(window_of(trace, seed, count))
    records = serve(at_load(window, load, _WORKERS, LATENCY), policy, seed)
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
    for i, (load, policy) in enumerate(product(loads, POLICIES)):
        run.progress(f"load {load:g}, {policy}", i, len(loads) * len(POLICIES))
        found[load, policy] = [fare(trace, load, policy, seed, count) for seed in seeds]
    return Finding(
        tables=(_table(found, loads, trace),),
        targets=(
            *(_order_target(found, load, pair) for load in loads for pair in pairwise(_ORDER)),
            *(_our_target(found, load) for load in loads),
        ),
        notes=(
            f"{count} prompts per seed, the first fifth does not count; behind: {OURS}'s mean TTFT"
            " less the system's, paired by seed",
        ),
        keys={
            "row_04": {
                f"load {load:g}": {policy: _json(found[load, policy]) for policy in POLICIES}
                for load in loads
            }
        },
        draw=lambda axes: _draw(axes, found, loads),
    )


def _ttfts(fares: Sequence[Fare]) -> list[float]:
    return [one.ttft_s for one in fares]


def _table(found: _Found, loads: Sequence[float], trace: Path | None) -> ResultTable:
    rows = []
    for (load, policy), fares in found.items():
        ours = difference(_ttfts(found[load, OURS]), _ttfts(fares))
        rows.append(
            (
                f"{load:g}",
                policy,
                show(Estimate.of(_ttfts(fares))),
                "" if policy == OURS else show(ours),
                f"{100 * fmean(f.hit_share for f in fares):.1f}",
                f"{100 * fmean(f.ideal_share for f in fares):.1f}",
                _PUBLISHED.get(policy, ""),
            )
        )
    return ResultTable(
        title=f"simulated: row 4, {trace_title(trace)}, {_WORKERS} prefill instances",
        columns=("load", "policy", "mean TTFT, s", "baton behind, s", "hit %", "ideal", "paper, s"),
        texts=2,
        rows=tuple(rows),
    )


def _order_target(found: _Found, load: float, pair: tuple[str, str]) -> Target:
    better, worse = pair
    gap = difference(_ttfts(found[load, worse]), _ttfts(found[load, better]))
    return Target(
        promise=f"simulated, load {load:g}: {better} has a lower mean TTFT than {worse}",
        measured=f"by {show(gap)} s",
        held=gap.mean - gap.half > 0,
    )


def _our_target(found: _Found, load: float) -> Target:
    others = [policy for policy in POLICIES if policy != OURS]
    best = min(others, key=lambda policy: fmean(_ttfts(found[load, policy])))
    behind = difference(_ttfts(found[load, OURS]), _ttfts(found[load, best]))
    return Target(
        promise=f"simulated, load {load:g}: {OURS} has the lowest mean TTFT, or ties",
        measured=f"{show(behind)} s behind {best}",
        held=behind.mean <= behind.half,
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
    for policy in POLICIES:
        means = [Estimate.of(_ttfts(found[load, policy])) for load in loads]
        axes.errorbar(
            loads, [m.mean for m in means], [m.half for m in means], marker="o", label=policy
        )
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
