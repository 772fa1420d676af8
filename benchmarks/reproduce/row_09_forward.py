"""Row 9: reject and forward against local queues under old reports (P/D-Serve, 2408.08147).

Its prefill workers keep no queue: one that is busy refuses, and the gateway asks the next, until
somebody takes the prompt. Motive: reports are 100 ms old. Published: 57 % of the requests in time
with queues at the workers, 99 % with forwarding.

Here every worker reports every so often to all routers (0: they see what is), a router counts its
own submits that no report shows yet, as the production view does, and a refusal takes a millisecond
to be heard. What a worker refuses is prefill_worker.policy's to say by `prefill.max_queued_tokens`,
of which 1 keeps no queue and 4,096 lets about a prompt more wait. Whom all have refused waits in
its router, first come, first served. Sixteen prefill workers at 85 % (Poisson) and at 50 % (bursts:
gaps of CV 13.2) of what they can do, so that the choice of a worker decides. Its services and NPUs
are not published; lengths and the CV are those of Azure's code trace of 2023, lognormal by median
and mean and cut at its 99th percentile, as the trace itself is not at hand. The worker is
Llama-3-8B on one H100 (see cases.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import (
    LLAMA_8B_H100,
    as_json,
    difference,
    percent,
    plot,
    seeds_of,
    show,
)
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import ENDLESS, split_pools
from core.estimate import Estimate
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster
from simulator.spec import SimSpec
from simulator.summary import summarise
from simulator.worker import WorkerSpec
from simulator.workload.arrivals import Constant, draw_arrivals
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PREFILLS, _DECODES = 16, 8
_MEAN_PROMPT_S = 0.043
"""Of a mean prompt alone on this worker."""
_SLO = Slo(ttft_s=0.2, tpot_s=0.05)
_WARM_UP = 0.1
_REQUESTS, _QUICK_REQUESTS = 1000, 300
_WORKER = WorkerSpec(
    latency=LLAMA_8B_H100,
    kv_blocks=25_000,
    block_size=16,
    step_tokens=8192,
    max_batch=1024,
    nic_bytes_per_s=50e9,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """`load`: of what the prefill workers can do."""

    name: str
    cv: float
    load: float


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """`queue_tokens`: prompts that a worker lets wait."""

    name: str
    router: RouterConfig
    queue_tokens: int = ENDLESS


ARRIVALS = (
    Arrivals(name="Poisson", cv=1.0, load=0.85),
    Arrivals(name="bursts", cv=13.2, load=0.5),
)
_ROOMY = RouterConfig(admission_max_requests=ENDLESS, admission_max_tokens=ENDLESS)
_SHORTEST = _ROOMY.model_copy(
    update={
        "admission": "off",
        "local_prefill": False,
        "prefill_policy": "least_load",
        "decode_policy": "least_load",
    }
)
_LOCAL, _FORWARDED = "shortest, queued", "shortest, forwarded"
_BATON, _BATON_FORWARDED = "baton", "baton, forwarded"
SYSTEMS = (
    System(name=_LOCAL, router=_SHORTEST),
    System(name=_FORWARDED, router=_SHORTEST, queue_tokens=1),
    System(name=_BATON, router=_ROOMY),
    System(name=_BATON_FORWARDED, router=_ROOMY, queue_tokens=4096),
)
_MANY = 16
"""Routers, each of which knows its own submits alone."""
_REPORTS_S = (0.0, 0.01, 0.1, 1.0)
_LATE_S = 0.1
"""What is published."""


def draw_requests(arrivals: Arrivals, seed: int, count: int) -> list[SimRequest]:
    """Lengths of Azure's code trace."""
    random = Random(seed)
    rate = Constant(arrivals.load * _PREFILLS / _MEAN_PROMPT_S)
    times_s = draw_arrivals(rate, count, random, cv=arrivals.cv)
    return [
        SimRequest(at_s, _length(random, 1469, 2048, 7436), _length(random, 13, 28, 251))
        for at_s in times_s
    ]


def _length(random: Random, median: float, mean: float, most: int) -> int:
    spread = math.sqrt(2 * math.log(mean / median))
    return min(most, max(2, round(random.lognormvariate(math.log(median), spread))))


def share_in_time(
    system: System, requests: Sequence[SimRequest], *, routers: int, report_s: float, seed: int
) -> float:
    """Of the requests that have their first token within the target; who is refused has not."""
    decoding = replace(_WORKER, step_tokens=512)
    spec = SimSpec(
        pools=split_pools(_PREFILLS, _DECODES, _WORKER, decoding),
        router=system.router,
        slo=_SLO,
        routers=routers,
        report_s=report_s,
        max_tokens=1024,
        max_queued_tokens=system.queue_tokens,
        samples=0,
        seed=seed,
    )
    outcome = Cluster(spec).run(requests)
    return summarise(outcome, _SLO, spec.gpus, warm_up=_WARM_UP).ttft_attainment


# -- the part -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """What differs between rows of the table."""

    arrivals: str
    routers: int
    report_s: float


Shares = dict[Case, dict[str, list[float]]]
"""By system, one per seed."""


def _run(run: Run) -> Finding:
    seeds = seeds_of(run.quick)
    kinds = {each.name: each for each in (ARRIVALS[:1] if run.quick else ARRIVALS)}
    reports_s = (0.0, _LATE_S) if run.quick else _REPORTS_S
    cases = [Case(name, _MANY, report_s) for name in kinds for report_s in reports_s]
    if not run.quick:
        cases += [Case(name, 1, _LATE_S) for name in kinds]
    shares: Shares = {}
    for i, case in enumerate(cases):
        text = f"{case.arrivals}, {case.routers} routers, {1e3 * case.report_s:g} ms"
        run.progress(text, i, len(cases))
        shares[case] = _shares(case, kinds[case.arrivals], seeds, quick=run.quick)
    return Finding(
        tables=(_table(shares),),
        targets=tuple(t for name in kinds for t in _targets(name, shares)),
        notes=("Published: 57 % in time with local queues, 99 % with forwarding.",),
        keys={"row_09": {_key(case): _json(by_system) for case, by_system in shares.items()}},
        draw=lambda axes: _draw(axes, shares),
    )


def _shares(
    case: Case, arrivals: Arrivals, seeds: Sequence[int], *, quick: bool
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {system.name: [] for system in SYSTEMS}
    for seed in seeds:
        requests = draw_requests(arrivals, seed, _QUICK_REQUESTS if quick else _REQUESTS)
        for system in SYSTEMS:
            share = share_in_time(
                system, requests, routers=case.routers, report_s=case.report_s, seed=seed
            )
            found[system.name].append(share)
    return found


def _targets(arrivals: str, shares: Shares) -> tuple[Target, ...]:
    now = shares[Case(arrivals, _MANY, 0.0)]
    late = shares[Case(arrivals, _MANY, _LATE_S)]
    closed = difference(now[_FORWARDED], now[_LOCAL])
    gained = difference(late[_FORWARDED], late[_LOCAL])
    ours = difference(late[_BATON_FORWARDED], late[_BATON])
    head = f"simulated, {arrivals}, {_MANY} routers"
    return (
        Target(
            promise=f"{head}, reports {1e3 * _LATE_S:g} ms apart: forwarding serves more in time"
            " than local queues",
            measured=_points(gained),
            held=gained.low > 0,
        ),
        Target(
            promise=f"{head}, true load: the gap is closed",
            measured=_points(closed),
            held=closed.low <= 0,
        ),
        Target(
            promise=f"{head}, reports {1e3 * _LATE_S:g} ms apart: Baton's default is better with"
            " forwarding",
            measured=_points(ours),
            held=ours.low > 0,
        ),
    )


def _points(gap: Estimate) -> str:
    return f"{100 * gap.mean:+.1f} +- {100 * gap.half:.1f} points"


def _table(shares: Shares) -> ResultTable:
    names = [system.name for system in SYSTEMS]
    return ResultTable(
        title=f"simulated: row 9, % of the requests with TTFT within {1e3 * _SLO.ttft_s:g} ms",
        columns=(
            "arrivals",
            "routers",
            "reports, ms",
            *names,
            "forwarded less queued, points",
            "baton: the same",
        ),
        texts=1,
        rows=tuple(
            (
                case.arrivals,
                str(case.routers),
                f"{1e3 * case.report_s:g}",
                *(show(percent(found[name]), 1) for name in names),
                _points(difference(found[_FORWARDED], found[_LOCAL])),
                _points(difference(found[_BATON_FORWARDED], found[_BATON])),
            )
            for case, found in shares.items()
        ),
    )


def _key(case: Case) -> str:
    return f"{case.arrivals}, {case.routers} routers, {1e3 * case.report_s:g} ms"


def _json(found: dict[str, list[float]]) -> dict[str, Json]:
    return {
        "simulated": True,
        "share_in_time": {name: as_json(Estimate.of(s)) for name, s in found.items()},
        "forwarded_less_queued": as_json(difference(found[_FORWARDED], found[_LOCAL])),
        "baton_forwarded_less_baton": as_json(difference(found[_BATON_FORWARDED], found[_BATON])),
    }


def _draw(axes: Axes, shares: Shares) -> None:
    for arrivals in {case.arrivals: None for case in shares}:
        cases = [c for c in shares if c.arrivals == arrivals and c.routers == _MANY]
        for system in SYSTEMS:
            plot(
                axes,
                [f"{1e3 * case.report_s:g}" for case in cases],
                [percent(shares[case][system.name]) for case in cases],
                marker="o",
                label=f"{arrivals}: {system.name}",
            )
    axes.set(xlabel="ms between reports", ylabel="TTFT within target, %", title="row 9, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="forward",
    what="row 9: P/D-Serve's forwarding on rejection against local queues, reports of any age",
    keys=("row_09",),
    run=_run,
)
