"""Row 13: running answers that move against fragmented memory (Llumnix, OSDI'24).

Published, 16 LLaMA-7B on A10: P99 of the time to the first token up to 15 times lower, fragmented
memory 7.9 to 0.7 %. Llumnix's instances do both phases, so what waits there is a prompt. Here a
prompt is computed elsewhere, and what waits for memory is its KV on the way to a decode worker:
the pause before the second token.

Sixteen decode workers of a 7B model on an A10: by the datasheet at 0.8 of its bandwidth and half of
its FLOP/s a step takes 28 ms and 1.1 us per token of context, a prompt 0.22 ms per token; 13,600
tokens of 512 KB fit beside the weights (Llumnix's set-up), and a GPU has 16 Gbit/s of the network.
Prompts and answers follow power laws (the paper's are not in our notes: a density of x to the -2.1
between 64 and 4,096 tokens). Eight prefill workers have room for all that waits. Closing a hand-off
or a move takes 20 ms, about the published pause.
Answers move by router.freeness, through decode_worker.migration: a what-if, as live ones move only
when told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import as_json, column, difference, plot, ratio, seeds_of, show
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import ENDLESS, NO_SLO, PLAIN, make_worker, split_pools
from core.estimate import Estimate, percentile
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from router.config import DecodePolicyName
from simulator.cluster import Cluster
from simulator.job import Record
from simulator.spec import NetworkSpec, SimSpec
from simulator.workload.arrivals import Constant, draw_arrivals
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DECODES = 16
_PREFILLS = 8
_KV_TOKENS = 13_600
_SHORTEST, _LONGEST, _ALPHA = 64, 4096, 1.1
_REQUESTS, _QUICK_REQUESTS = 5000, 1000
_WARM_UP = 0.3
_RATES_RPS = (24.0, 28.0, 32.0, 36.0)
_PREFILL = make_worker(
    FittedLatency(
        prefill=PrefillCurve(base_s=0.028, per_token_s=2.2e-4),
        decode=(DecodeCurve(base_s=0.028, per_context_token_s=1.1e-6),),
    ),
    kv_tokens=1_000_000,
    step_tokens=2048,
    max_batch=1024,
    kv_bytes_per_token=524_288,
    link_bytes_per_s=2e9,
)
_DECODE = replace(_PREFILL, kv_blocks=_KV_TOKENS // 16, step_tokens=512)


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """How a decode worker is chosen, and whether answers move afterwards."""

    policy: DecodePolicyName
    moves: bool

    @property
    def name(self) -> str:
        return f"{self.policy}, moving" if self.moves else self.policy


POLICIES: tuple[DecodePolicyName, ...] = ("round_robin", "baton")
SYSTEMS = tuple(System(policy=p, moves=moves) for p, moves in product(POLICIES, (False, True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fare:
    """Of one run. `pause_s`: from the first token to KV that can be used; `moved`: the longest that
    an answer stood still for a move, in the mean of those that did.
    """

    pause_p99_s: float
    pause_mean_s: float
    tpot_p99_s: float
    fragmented: float
    evictions: float
    moves: float
    moved_s: float


def draw_requests(seed: int, count: int, rps: float) -> list[SimRequest]:
    """Prompts and answers of any length, Poisson arrivals."""
    random = Random(seed)
    times_s = draw_arrivals(Constant(rps), count, random)
    return [SimRequest(at_s, _length(random), _length(random)) for at_s in times_s]


def _length(random: Random) -> int:
    """By inverting the law's distribution between its ends."""
    low, high = _SHORTEST**-_ALPHA, _LONGEST**-_ALPHA
    drawn: float = (low - random.random() * (low - high)) ** (-1 / _ALPHA)
    return round(drawn)


def serve(system: System, rps: float, seed: int, count: int) -> Fare:
    """What became of the requests at that rate, but for those of the warm-up."""
    spec = SimSpec(
        pools=split_pools(_PREFILLS, _DECODES, _PREFILL, _DECODE),
        router=PLAIN.model_copy(update={"decode_policy": system.policy}),
        slo=NO_SLO,
        network=NetworkSpec(control_s=0.02),
        max_tokens=_LONGEST,
        max_queued_tokens=ENDLESS,
        max_sequences=ENDLESS,
        moves_answers=system.moves,
        samples=400,
        seed=seed,
    )
    outcome = Cluster(spec).run(draw_requests(seed, count, rps))
    records = outcome.records[int(_WARM_UP * count) :]
    samples = outcome.samples["decode"]
    settled = samples[int(_WARM_UP * len(samples)) :]
    return Fare(
        pause_p99_s=percentile([r.transfer_s for r in records], 0.99),
        pause_mean_s=fmean(r.transfer_s for r in records),
        tpot_p99_s=percentile([r.tpot_s for r in records], 0.99),
        fragmented=fmean(sample.fragmented_share for sample in settled),
        evictions=100 * fmean(r.evictions for r in records),
        moves=100 * fmean(r.moves for r in records),
        moved_s=_mean_pause_s(records),
    )


def _mean_pause_s(records: Sequence[Record]) -> float:
    pauses_s = [record.pause_s for record in records if record.moves]
    return fmean(pauses_s) if pauses_s else 0.0


# -- the part -----------------------------------------------------------------------------------

_Found = dict[tuple[float, System], list[Fare]]
_COLUMNS = {
    "pause_p99_s": 2,
    "pause_mean_s": 3,
    "tpot_p99_s": 4,
    "fragmented": 4,
    "evictions": 1,
    "moves": 1,
    "moved_s": 4,
}


def _run(run: Run) -> Finding:
    seeds, count = seeds_of(run.quick), _QUICK_REQUESTS if run.quick else _REQUESTS
    rates_rps = _RATES_RPS[1:2] if run.quick else _RATES_RPS
    found: _Found = {}
    for rps, system in product(rates_rps, SYSTEMS):
        run.progress(f"{rps:g}/s, {system.name}", len(found), len(rates_rps) * len(SYSTEMS))
        found[rps, system] = [serve(system, rps, seed, count) for seed in seeds]
    return Finding(
        tables=(_table(found),),
        targets=tuple(
            t for rps, policy in product(rates_rps, POLICIES) for t in _targets(rps, policy, found)
        ),
        notes=("Published: P99 up to 15 times lower, fragmented memory 7.9 to 0.7 %.",),
        keys={"row_13": _json(found)},
        draw=lambda axes: _draw(axes, found),
    )


def _targets(rps: float, policy: DecodePolicyName, found: _Found) -> tuple[Target, ...]:
    stays = found[rps, System(policy=policy, moves=False)]
    moves = found[rps, System(policy=policy, moves=True)]
    shorter = difference(column(stays, "pause_p99_s"), column(moves, "pause_p99_s"))
    less = Estimate.of(column(stays, "fragmented")).mean
    left = Estimate.of(column(moves, "fragmented")).mean
    return (
        Target(
            promise=f"simulated, {rps:g}/s, {policy}: moving cuts the P99 pause before token two",
            measured=f"by {show(shorter)} s",
            held=shorter.low > 0,
        ),
        Target(
            promise=f"simulated, {rps:g}/s, {policy}: moving leaves a fifth of the fragmentation",
            measured=f"{100 * less:.2f} and {100 * left:.2f} %",
            held=less >= 5 * left and less > 0,
        ),
    )


def _table(found: _Found) -> ResultTable:
    rows = []
    for (rps, system), fares in found.items():
        cells = [show(Estimate.of(column(fares, c)), digits) for c, digits in _COLUMNS.items()]
        stays = found[rps, replace(system, moves=False)]
        faster = ""
        if system.moves:
            faster = show(ratio(column(stays, "pause_p99_s"), column(fares, "pause_p99_s")), 1)
        rows.append((f"{rps:g}", system.name, *cells, faster))
    return ResultTable(
        title=f"simulated: row 13, {_DECODES} decode workers of {_KV_TOKENS:,} tokens of KV",
        columns=(
            "requests/s",
            "system",
            "pause p99, s",
            "pause mean, s",
            "tpot p99, s",
            "fragmented",
            "evictions per 100",
            "moves per 100",
            "stood still, s",
            "times faster",
        ),
        texts=2,
        rows=tuple(rows),
    )


def _json(found: _Found) -> dict[str, Json]:
    return {
        f"{rps:g}/s: {system.name}": {
            "simulated": True,
            **{name: as_json(Estimate.of(column(fares, name))) for name in _COLUMNS},
        }
        for (rps, system), fares in found.items()
    }


def _draw(axes: Axes, found: _Found) -> None:
    rates_rps = list(dict.fromkeys(rps for rps, _ in found))
    for system in SYSTEMS:
        pauses = [Estimate.of(column(found[rps, system], "pause_p99_s")) for rps in rates_rps]
        plot(axes, rates_rps, pauses, marker="o", label=system.name)
    axes.set(xlabel="requests/s", ylabel="P99 of the wait for memory, s", title="row 13, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="migration",
    what="row 13: Llumnix's moves of running answers against fragmented memory",
    keys=("row_13",),
    run=_run,
)
