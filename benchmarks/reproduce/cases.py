"""What rows share: simulated runs, seeds, paired differences, and how they are written."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from operator import sub

from benchmarks.numbers import Estimate
from benchmarks.types import Json
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster, Outcome
from simulator.spec import NetworkSpec, PoolRole, PoolSpec, SimSpec
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest

SEEDS = 5
QUICK_SEEDS = 2
NO_SLO = Slo(ttft_s=1e6, tpot_s=1e6)
PLAIN = RouterConfig(admission="off", local_prefill=False, request_timeout_s=1e6)
"""The production router, but all requests are served and every prompt is handed over."""


@dataclass(frozen=True, slots=True)
class Workers:
    """Equal workers of one role."""

    role: PoolRole
    count: int
    worker: WorkerSpec


def run_cluster(
    requests: Sequence[SimRequest],
    pools: Sequence[Workers],
    *,
    slo: Slo = NO_SLO,
    router: RouterConfig = PLAIN,
    max_tokens: int = 2048,
    seed: int = 0,
) -> Outcome:
    """One run, to the end of every request."""
    spec = SimSpec(
        pools=tuple(
            PoolSpec(name=pool.role.value, role=pool.role, workers=pool.count, worker=pool.worker)
            for pool in pools
        ),
        router=router,
        slo=slo,
        network=NetworkSpec(),
        max_tokens=max_tokens,
        max_queued_tokens=10**9,
        max_sequences=10**6,
        samples=0,
        seed=seed,
    )
    return Cluster(spec).run(requests)


def seeds_of(quick: bool) -> range:
    """The seeds of a full or a quick run."""
    return range(QUICK_SEEDS if quick else SEEDS)


def difference(mine: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mine less the others', seed by seed."""
    return Estimate.of(list(starmap(sub, zip(mine, others, strict=True))))


def ratio(mine: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mine by the others', seed by seed."""
    return Estimate.of([a / b for a, b in zip(mine, others, strict=True)])


def show(estimate: Estimate, digits: int = 2) -> str:
    """With the half width of its interval."""
    return f"{estimate.mean:.{digits}f} +- {estimate.half:.{digits}f}"


def as_json(estimate: Estimate) -> dict[str, Json]:
    """For the JSON object."""
    return {"mean": estimate.mean, "half": estimate.half}
