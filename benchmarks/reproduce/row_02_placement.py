"""Row 2: DistServe's placements (OSDI'24, algorithms 1 and 2) against colocated chunked prefill.

Its table of targets (arXiv v2), on its own fits of A100-80G. For each application the planner
(simulator/plan) searches once on draws of its own: any placement (algorithm 1), both phases within
a node (algorithm 2), and the best colocated workers with the best of the chunk sizes. What it found
is then rated on other draws. Chat lengths are drawn from percentiles that DistServe published (see
benchmarks/validate/distserve.py); of HumanEval and LongBench only means are known (171 tokens in
and 98 out, 1,738 and 91: remembered, not checked), so these are lognormal around them, with a
spread of 0.5. OPT-175B has no published fit.
DistServe's own baseline was vLLM of its time, at one degree and without chunks. It stands beside
the other as "colocated, unchunked", and its steps of both kinds read the weights twice. How much of
the difference that is, the best colocated plan says when its steps read them twice as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import as_json, ratio, seeds_of, show
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.distserve import ANSWERS, PROMPTS
from core.estimate import Estimate
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.plan.search import search
from simulator.plan.trial import find_goodput, plan_setup, simulate
from simulator.plan.types import Affinity, Goodput, Offer, Option, Plan, Pool, Problem, Rated
from simulator.profiles.published import DISTSERVE_KV_TOKENS, distserve_latency
from simulator.workload.arrivals import Constant, draw_arrivals
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GPUS = 8
_REQUESTS = 1000
_SPREAD = 0.5
_KV_BYTES = {"opt-13b": 819_200, "opt-66b": 2_359_296}
_WEIGHT_BYTES = 132e9
_KV_TOKENS = {
    "opt-13b": DISTSERVE_KV_TOKENS,
    "opt-66b": {
        tp: int((0.9 * tp * 80e9 - _WEIGHT_BYTES) / _KV_BYTES["opt-66b"]) for tp in (2, 4, 8)
    },
}
_NIC_BYTES_PER_S = 25e9
_NVLINK_BYTES_PER_S = 300e9
_LEVELS = (0.5, 1.0, 1.5)
"""Rates, in those that the colocated workers serve."""
_SEARCH_SEED = 100
_ANY, _NODE = "any placement", "within a node"
_PLACED = {_ANY: Affinity.HIGH, _NODE: Affinity.LOW}
_COLOCATED, _UNCHUNKED = "colocated", "colocated, unchunked"
_TWICE = "colocated, weights read twice"
_WHOLE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """A row of DistServe's table. `means` are tokens in and out; None: the published percentiles.
    `published` is its gain in rate over vLLM.
    """

    name: str
    model: str
    slo: Slo
    means: tuple[float, float] | None
    baseline_tp: int
    node_gpus: int
    published: str


APPLICATIONS = (
    Application(
        name="chat, 13B",
        model="opt-13b",
        slo=Slo(ttft_s=0.2, tpot_s=0.1),
        means=None,
        baseline_tp=1,
        node_gpus=4,
        published="2.0-3.41",
    ),
    Application(
        name="chat, 66B",
        model="opt-66b",
        slo=Slo(ttft_s=0.4, tpot_s=0.1),
        means=None,
        baseline_tp=4,
        node_gpus=8,
        published="2.0-3.41",
    ),
    Application(
        name="code, 66B",
        model="opt-66b",
        slo=Slo(ttft_s=0.125, tpot_s=0.2),
        means=(171.0, 98.0),
        baseline_tp=4,
        node_gpus=8,
        published="3.2",
    ),
    Application(
        name="summaries, 66B",
        model="opt-66b",
        slo=Slo(ttft_s=15.0, tpot_s=0.15),
        means=(1738.0, 91.0),
        baseline_tp=4,
        node_gpus=8,
        published="4.48",
    ),
)


def options_of(model: str) -> tuple[Option, ...]:
    """Every degree DistServe fitted. A step that does both reads the weights once: without that,
    colocated steps would be charged twice for it.
    """
    options = []
    for tp, kv_tokens in _KV_TOKENS[model].items():
        latency = distserve_latency(model, tp)
        options.append(
            Option(
                gpu="a100",
                tp=tp,
                latency=replace(latency, mixed_saves_s=latency.decode[0].base_s),
                kv_tokens=kv_tokens,
                nic_bytes_per_s=tp * _NIC_BYTES_PER_S,
                nvlink_bytes_per_s=tp * _NVLINK_BYTES_PER_S,
            )
        )
    return tuple(options)


def draw_requests(app: Application, seed: int, count: int = _REQUESTS) -> tuple[SimRequest, ...]:
    """Poisson arrivals of one per second; runs stretch them."""
    random = Random(seed)
    times_s = draw_arrivals(Constant(1.0), count, random)
    return tuple(SimRequest(at_s, *_lengths(app, random)) for at_s in times_s)


def _lengths(app: Application, random: Random) -> tuple[int, int]:
    if app.means is None:
        prompt, answer = PROMPTS.at(random.random()), ANSWERS.at(random.random())
    else:
        shift = _SPREAD**2 / 2
        prompt, answer = (random.lognormvariate(math.log(m) - shift, _SPREAD) for m in app.means)
    return min(2047, max(1, round(prompt))), max(2, round(answer))


def pose(app: Application, affinity: Affinity, seed: int) -> Problem:
    """What is planned, and rated with other seeds."""
    return Problem(
        options=options_of(app.model),
        offers=(Offer(gpu="a100", count=_GPUS),),
        gpus=_GPUS,
        slo=app.slo,
        share=0.9,
        requests=draw_requests(app, seed),
        block_size=16,
        kv_bytes_per_token=_KV_BYTES[app.model],
        affinity=affinity,
        node_gpus=app.node_gpus,
        chunks=(512, 2048),
        router=RouterConfig(admission="off"),
        least_requests=200,
        run_s=10.0,
        width=0.05,
        seed=seed,
    )


def find_plans(app: Application) -> dict[str, Rated]:
    """By name, those that serve any rate. Where one node has all GPUs, any placement is in it."""
    found: dict[str, Rated] = {}
    for name, affinity in _PLACED.items():
        if name == _NODE and app.node_gpus >= _GPUS:
            continue
        answer = search(pose(app, affinity, _SEARCH_SEED), progress=lambda text, done, total: None)
        if answer.best:
            found[name] = answer.best[0]
        if answer.colocated is not None:
            found[_COLOCATED] = answer.colocated
    if _COLOCATED in found:
        found[_TWICE] = reads_twice(app, found[_COLOCATED])
        found[_UNCHUNKED] = unchunked(app, found[_COLOCATED].goodput)
    return found


def unchunked(app: Application, goodput: Goodput) -> Rated:
    """DistServe's baseline on the same GPUs; `goodput` is where the search for its own begins."""
    option = next(o for o in options_of(app.model) if o.tp == app.baseline_tp)
    bare = replace(option, latency=distserve_latency(app.model, app.baseline_tp))
    pool = Pool(option=bare, step_tokens=_WHOLE, workers=_GPUS // bare.tp)
    plan = Plan(prefill=pool, decode=None)
    return Rated(plan=plan, fleet=plan, goodput=replace(goodput, rps=goodput.rps / 2))


def reads_twice(app: Application, rated: Rated) -> Rated:
    """The same workers, charged for a prompt's step and a decode step where they do both."""

    def bare(plan: Plan) -> Plan:
        option = plan.prefill.option
        latency = distserve_latency(app.model, option.tp)
        return replace(plan, prefill=replace(plan.prefill, option=replace(option, latency=latency)))

    return replace(rated, plan=bare(rated.plan), fleet=bare(rated.fleet))


def rate(app: Application, name: str, rated: Rated, seed: int) -> Rated:
    """The same plan on other draws."""
    problem = pose(app, _PLACED.get(name, Affinity.HIGH), seed)
    setup = plan_setup(problem, rated.fleet, max(0.1, rated.goodput.rps))
    return replace(rated, goodput=find_goodput(problem, setup))


def fare(app: Application, name: str, rated: Rated, rps_per_gpu: float, seed: int) -> Goodput:
    """How requests fare with a plan at one rate."""
    problem = pose(app, _PLACED.get(name, Affinity.HIGH), seed)
    rps = rps_per_gpu * rated.fleet.gpus
    return simulate(problem, plan_setup(problem, rated.fleet, rps), rps)


# -- the part -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    plans: dict[str, Rated]
    rates: dict[str, list[float]]
    """Requests/s per GPU, by seed."""
    shares: dict[str, list[Estimate]]
    """Within both targets, at `_LEVELS`."""


def _run(run: Run) -> Finding:
    seeds = seeds_of(run.quick)
    apps = APPLICATIONS[2:3] if run.quick else APPLICATIONS
    results: dict[str, _Result] = {}
    for i, app in enumerate(apps):
        run.progress(f"{app.name}: the search", 2 * i, 2 * len(apps))
        plans = find_plans(app)
        run.progress(f"{app.name}: other draws", 2 * i + 1, 2 * len(apps))
        results[app.name] = _rate_all(app, plans, seeds)
    gains = {
        (name, base): ratio(result.rates[_ANY], result.rates[base])
        for name, result in results.items()
        for base in (_COLOCATED, _TWICE, _UNCHUNKED)
        if _ANY in result.rates and min(result.rates.get(base, [0.0])) > 0
    }
    return Finding(
        tables=(_table(apps, results), *(_levels(name, r) for name, r in results.items())),
        targets=tuple(
            Target(
                promise=f"simulated, {name}: any placement serves more per GPU than {base}",
                measured=f"{show(gain)} times",
                held=gain.low > 1,
            )
            for (name, base), gain in gains.items()
        ),
        keys={"row_02": {name: _json(name, r, gains) for name, r in results.items()}},
        draw=lambda axes: _draw(axes, results),
    )


def _rate_all(app: Application, plans: dict[str, Rated], seeds: Sequence[int]) -> _Result:
    rates = {
        name: [rate(app, name, plan, seed).rps_per_gpu for seed in seeds]
        for name, plan in plans.items()
    }
    top = Estimate.of(rates[_COLOCATED]).mean if _COLOCATED in rates else 0.0
    shares = {
        name: [
            Estimate.of([fare(app, name, plan, level * top, seed).share for seed in seeds])
            for level in _LEVELS
        ]
        for name, plan in plans.items()
        if top > 0
    }
    return _Result(plans=plans, rates=rates, shares=shares)


def describe(plan: Plan) -> str:
    """Workers, degrees and chunk sizes."""
    pools = " + ".join(
        f"{p.workers} x tp{p.option.tp}/{'whole' if p.step_tokens == _WHOLE else p.step_tokens}"
        for p in plan.pools
    )
    return f"{plan.copies} x ({pools})" if plan.copies > 1 else pools


def _table(apps: Sequence[Application], results: dict[str, _Result]) -> ResultTable:
    rows = []
    for app in apps:
        result = results[app.name]
        base = result.rates.get(_COLOCATED)
        for name, rates in result.rates.items():
            by = ratio(rates, base) if base and min(base) > 0 else None
            rows.append(
                (
                    app.name,
                    name,
                    describe(result.plans[name].plan),
                    show(Estimate.of(rates), 3),
                    "-" if by is None else show(by),
                    app.published if name in _PLACED else "",
                )
            )
    return ResultTable(
        title=f"simulated: row 2, {_GPUS} A100, 90 % within both targets",
        columns=("application", "placement", "plan", "requests/s per GPU", "by colocated", "paper"),
        texts=3,
        rows=tuple(rows),
    )


def _levels(name: str, result: _Result) -> ResultTable:
    return ResultTable(
        title=f"simulated: row 2, {name}: % within both targets, by rate in colocated goodputs",
        columns=("placement", *(f"{level:g}" for level in _LEVELS)),
        texts=1,
        rows=tuple(
            (placed, *(f"{100 * s.mean:.1f} +- {100 * s.half:.1f}" for s in shares))
            for placed, shares in result.shares.items()
        ),
    )


def _json(name: str, result: _Result, gains: dict[tuple[str, str], Estimate]) -> dict[str, Json]:
    return {
        "simulated": True,
        "gain_by": {base: as_json(g) for (app, base), g in gains.items() if app == name},
        "plans": {placed: describe(rated.plan) for placed, rated in result.plans.items()},
        "requests_per_s_per_gpu": {
            placed: as_json(Estimate.of(rates)) for placed, rates in result.rates.items()
        },
    }


def _draw(axes: Axes, results: dict[str, _Result]) -> None:
    for name, result in results.items():
        for placed, shares in result.shares.items():
            axes.plot(
                _LEVELS, [100 * s.mean for s in shares], marker="o", label=f"{name}, {placed}"
            )
    axes.set_xlabel("rate, in what colocated workers serve")
    axes.set_ylabel("within both targets, %")
    axes.set_title("row 2, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="placement",
    what="row 2: DistServe's placements against colocated chunked prefill, its table of targets",
    keys=("row_02",),
    run=_run,
)
