"""Row 14: what a newcomer leaves free on a decode worker short of KV (Past-Future, ASPLOS'25).

Published: 2 to 3 times the goodput of aggressive admission, which takes whoever fits now and evicts
later, and of conservative admission, which keeps all that a client may ask for. A hand-off asks
before it takes blocks, and who does not find room waits in order; whoever is evicted computes its
context again.

    aggressive     a block for each that runs is left free (production: decode_worker/policy.py)
    conservative   all that clients allow (decode_worker/headroom.py)
    past-future    the predicted peak (the same), and 5 % of the memory

Answers are long: lengths of ServeGen's deepseek-r1 (1,377 tokens in and 1,502 out; 4,068 and 4,890
at the 99th percentile), lognormal by mean and percentile as the client windows are not at hand.
Clients allow 8,192. One prefill and four decode workers, Llama-3-8B on one H100 (see cases.py) that
has 40,000 tokens left for KV: room for about 18 of them at once.

Two measures, as an eviction is a long pause, which a mean hides: both targets kept (2 s, and 20 ms
per token in the mean, waits for memory included), and unbroken: on its way within 5 s, the wait for
memory included, and never evicted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import (
    LLAMA_8B_H100,
    as_json,
    difference,
    percent,
    ratio,
    seeds_of,
    show,
)
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import Workers, make_worker, run_cluster
from core.estimate import Estimate
from simulator.job import Record
from simulator.plan.trial import highest
from simulator.plan.types import Goodput
from simulator.spec import PoolRole
from simulator.worker import Headroom
from simulator.workload.arrivals import Constant, draw_arrivals
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AGGRESSIVE, CONSERVATIVE, PAST_FUTURE = "aggressive", "conservative", "past-future"
RULES: dict[str, Headroom] = {AGGRESSIVE: "running", CONSERVATIVE: "limit", PAST_FUTURE: "peak"}
_DECODES = 4
_KV_TOKENS = 40_000
_MOST_OUTPUT = 8192
_TTFT_S, _TPOT_S, _START_S = 2.0, 0.02, 5.0
_SHARE = 0.9
_WARM_UP = 0.3
_REQUESTS, _QUICK_REQUESTS = 600, 150
_GUESS_RPS = {AGGRESSIVE: 4.5, CONSERVATIVE: 0.8, PAST_FUTURE: 4.5}
_WIDTH = 0.04
_RATES_RPS = (3.5, 4.0, 4.5, 5.0, 5.5)
_PREFILL = make_worker(
    LLAMA_8B_H100,
    kv_tokens=400_000,
    step_tokens=8192,
    max_batch=1024,
    kv_bytes_per_token=131_072,
    link_bytes_per_s=50e9,
)
_DECODE = replace(_PREFILL, kv_blocks=_KV_TOKENS // 16, step_tokens=512)


def draw_requests(seed: int, count: int) -> list[SimRequest]:
    """One per second; runs stretch them."""
    random = Random(seed)
    times_s = draw_arrivals(Constant(1.0), count, random)
    return [
        SimRequest(
            at_s,
            _length(random, 1377, 4068, 16_000),
            _length(random, 1502, 4890, _MOST_OUTPUT),
        )
        for at_s in times_s
    ]


def _length(random: Random, mean: float, p99: float, most: int) -> int:
    """Lognormal: log p99 - log mean = 2.326 s - s^2 / 2."""
    z = 2.3263
    spread = z - math.sqrt(z**2 - 2 * math.log(p99 / mean))
    drawn = random.lognormvariate(math.log(mean) - spread**2 / 2, spread)
    return min(most, max(2, round(drawn)))


def serve(rule: str, requests: Sequence[SimRequest], rps: float, seed: int) -> list[Record]:
    """What becomes of the requests at that rate, but for those of the warm-up."""
    pools = (
        Workers(PoolRole.PREFILL, 1, _PREFILL),
        Workers(PoolRole.DECODE, _DECODES, replace(_DECODE, headroom=RULES[rule])),
    )
    asked = [replace(request, at_s=request.at_s / rps) for request in requests]
    outcome = run_cluster(asked, pools, max_tokens=_MOST_OUTPUT, seed=seed)
    return list(outcome.records[int(_WARM_UP * len(requests)) :])


def keeps_targets(record: Record) -> bool:
    """In the mean."""
    return record.ttft_s <= _TTFT_S and record.tpot_s <= _TPOT_S


def is_unbroken(record: Record) -> bool:
    """On its way in time, and never evicted."""
    return record.ttft_s + record.transfer_s <= _START_S and not record.evictions


MEASURES: dict[str, Callable[[Record], bool]] = {
    "targets": keeps_targets,
    "unbroken": is_unbroken,
}


def goodput_rps(measure: str, rule: str, requests: Sequence[SimRequest], seed: int) -> float:
    """The highest rate at which 90 % are good."""
    is_good = MEASURES[measure]

    def at(rps: float) -> Goodput:
        records = serve(rule, requests, rps, seed)
        share = sum(map(is_good, records)) / len(records)
        return Goodput(rps=rps, share=share, ttft_p90_s=0.0, tpot_p90_s=0.0, hit_share=0.0)

    return highest(at, share=_SHARE, guess_rps=_GUESS_RPS[rule], width=_WIDTH).rps


# -- the part -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _At:
    """By seed, at one rate."""

    evictions: list[float]
    """Per 100 requests."""
    shares: dict[str, list[float]]
    """By measure."""


def _run(run: Run) -> Finding:
    seeds = seeds_of(run.quick)
    count = _QUICK_REQUESTS if run.quick else _REQUESTS
    asked = {seed: draw_requests(seed, count) for seed in seeds}
    rates_rps = _RATES_RPS[2:3] if run.quick else _RATES_RPS
    measures = list(MEASURES)[1:] if run.quick else list(MEASURES)
    goodputs: dict[tuple[str, str], list[float]] = {}
    for i, measure in enumerate(measures):
        for k, rule in enumerate(RULES):
            run.progress(f"{rule}, {measure}", i * len(RULES) + k, 9)
            found = [goodput_rps(measure, rule, asked[seed], seed) for seed in seeds]
            goodputs[measure, rule] = found
    at: dict[tuple[str, float], _At] = {}
    for k, rule in enumerate(RULES):
        run.progress(f"{rule}, at given rates", 6 + k, 9)
        for rps in rates_rps:
            at[rule, rps] = _fare(rule, rps, asked)
    return Finding(
        tables=(_goodput_table(goodputs), _rate_table(at)),
        targets=tuple(_targets(goodputs, at)),
        notes=("Published: 2 to 3 times the goodput of both, under heavy load.",),
        keys={"row_14": _json(goodputs, at)},
        draw=lambda axes: _draw(axes, at),
    )


def _fare(rule: str, rps: float, asked: dict[int, list[SimRequest]]) -> _At:
    runs = [serve(rule, requests, rps, seed) for seed, requests in asked.items()]
    return _At(
        evictions=[100 * sum(r.evictions for r in records) / len(records) for records in runs],
        shares={
            name: [sum(map(is_good, records)) / len(records) for records in runs]
            for name, is_good in MEASURES.items()
        },
    )


def _targets(
    goodputs: dict[tuple[str, str], list[float]], at: dict[tuple[str, float], _At]
) -> list[Target]:
    rps = max(rate for _, rate in at if rate <= 4.5)
    fewer = difference(at[AGGRESSIVE, rps].evictions, at[PAST_FUTURE, rps].evictions)
    targets = [
        Target(
            promise=f"simulated: fewer evictions than aggressive at {rps:g} requests/s",
            measured=f"{show(fewer, 1)} fewer per 100 requests",
            held=fewer.low > 0,
        )
    ]
    for measure in dict.fromkeys(measure for measure, _ in goodputs):
        for other in (AGGRESSIVE, CONSERVATIVE):
            gain = ratio(goodputs[measure, PAST_FUTURE], goodputs[measure, other])
            targets.append(
                Target(
                    promise=f"simulated, {measure}: past-future has 1.3 times {other}'s goodput",
                    measured=f"{show(gain)} times",
                    held=gain.low >= 1.3,
                )
            )
    return targets


def _goodput_table(goodputs: dict[tuple[str, str], list[float]]) -> ResultTable:
    return ResultTable(
        title=f"simulated: row 14, {_DECODES} decode workers of {_KV_TOKENS:,} tokens of KV:"
        " goodput, requests/s",
        columns=("measure", "rule", "requests/s", "past-future by it"),
        texts=2,
        rows=tuple(
            (
                measure,
                rule,
                show(Estimate.of(rates)),
                show(ratio(goodputs[measure, PAST_FUTURE], rates)),
            )
            for (measure, rule), rates in goodputs.items()
        ),
    )


def _rate_table(at: dict[tuple[str, float], _At]) -> ResultTable:
    return ResultTable(
        title="simulated: row 14, at given rates",
        columns=("rule", "requests/s", "evictions per 100", *(f"{name}, %" for name in MEASURES)),
        texts=1,
        rows=tuple(
            (
                rule,
                f"{rps:g}",
                show(Estimate.of(fared.evictions), 1),
                *(show(percent(fared.shares[m]), 1) for m in MEASURES),
            )
            for (rule, rps), fared in at.items()
        ),
    )


def _json(
    goodputs: dict[tuple[str, str], list[float]], at: dict[tuple[str, float], _At]
) -> dict[str, Json]:
    return {
        "simulated": True,
        "goodput_requests_per_s": {
            f"{measure}, {rule}": as_json(Estimate.of(rates))
            for (measure, rule), rates in goodputs.items()
        },
        "past_future_by": {
            f"{measure}, {rule}": as_json(ratio(goodputs[measure, PAST_FUTURE], rates))
            for (measure, rule), rates in goodputs.items()
        },
        "at": {
            f"{rule}, {rps:g} requests/s": {
                "evictions_per_100": as_json(Estimate.of(fared.evictions)),
                **{name: as_json(Estimate.of(s)) for name, s in fared.shares.items()},
            }
            for (rule, rps), fared in at.items()
        },
    }


def _draw(axes: Axes, at: dict[tuple[str, float], _At]) -> None:
    for rule in RULES:
        points = {rps: fared for (name, rps), fared in at.items() if name == rule}
        for measure, style in zip(MEASURES, ("-", "--"), strict=True):
            axes.plot(
                list(points),
                [percent(p.shares[measure]).mean for p in points.values()],
                style,
                marker="o",
                label=f"{rule}, {measure}",
            )
    axes.set(xlabel="requests/s", ylabel="good, %", title="row 14, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="headroom",
    what="row 14: Past-Future's admission on decode workers short of KV",
    keys=("row_14",),
    run=_run,
)
