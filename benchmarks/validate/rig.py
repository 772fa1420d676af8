"""Small simulated clusters, and where the files are that a part needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.types import Finding, Run, Target
from engine.latency.base import LatencyModel
from kv_transfer.config import TransferConfig
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster, Outcome
from simulator.job import Record
from simulator.spec import NetworkSpec, PoolRole, PoolSpec, SimSpec
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest

NO_SLO = Slo(ttft_s=1e6, tpot_s=1e6)
PLAIN = RouterConfig(admission="off", local_prefill=False, requeue=False, request_timeout_s=1e6)
"""The production router, but all requests are served where they were placed, and every prompt is
handed over.
"""
ENDLESS = 10**9
_SHORTEST_QUEUE = PLAIN.model_copy(
    update={"prefill_policy": "least_load", "decode_policy": "least_load"}
)


@dataclass(frozen=True, slots=True)
class Workers:
    """Equal workers of one role."""

    role: PoolRole
    count: int
    worker: WorkerSpec


def make_worker(
    latency: LatencyModel,
    *,
    kv_tokens: int = 1_000_000,
    block_size: int = 16,
    step_tokens: int = ENDLESS,
    max_batch: int = ENDLESS,
    max_running: int | None = None,
    kv_bytes_per_token: int = 0,
    link_bytes_per_s: float = 1e15,
    gpus: int = 1,
) -> WorkerSpec:
    """By default all steps are as large as there is work, and KV moves in no time."""
    return WorkerSpec(
        latency=latency,
        kv_blocks=kv_tokens // block_size,
        block_size=block_size,
        step_tokens=step_tokens,
        max_batch=max_batch,
        max_running=max_running,
        kv_bytes_per_token=kv_bytes_per_token,
        nic_bytes_per_s=link_bytes_per_s,
        gpus=gpus,
    )


def split_pools(
    prefills: int, decodes: int, prefill: WorkerSpec, decode: WorkerSpec
) -> tuple[PoolSpec, PoolSpec]:
    """So many workers of each kind."""
    return (
        PoolSpec(name="prefill", role=PoolRole.PREFILL, workers=prefills, worker=prefill),
        PoolSpec(name="decode", role=PoolRole.DECODE, workers=decodes, worker=decode),
    )


def run_cluster(
    requests: Sequence[SimRequest],
    pools: Sequence[Workers],
    *,
    slo: Slo = NO_SLO,
    router: RouterConfig = PLAIN,
    network: NetworkSpec | None = None,
    fetch: bool = False,
    max_tokens: int = 2048,
    seed: int = 0,
) -> Outcome:
    """One run, to the end of every request. `fetch`: prefill workers copy prefixes from others."""
    spec = SimSpec(
        pools=tuple(
            PoolSpec(name=pool.role.value, role=pool.role, workers=pool.count, worker=pool.worker)
            for pool in pools
        ),
        router=router,
        slo=slo,
        network=network or NetworkSpec(),
        transfer=TransferConfig(fetch=fetch),
        max_tokens=max_tokens,
        max_queued_tokens=ENDLESS,
        max_sequences=ENDLESS,
        samples=0,
        seed=seed,
    )
    return Cluster(spec).run(requests)


def simulate(
    requests: Sequence[SimRequest], pools: dict[PoolRole, WorkerSpec], *, seed: int = 0
) -> tuple[Record, ...]:
    """One worker per role, a network that takes no time; records in order of arrival."""
    return run_cluster(
        requests,
        [Workers(role, 1, worker) for role, worker in pools.items()],
        router=_SHORTEST_QUEUE,
        network=NetworkSpec(control_s=0.0, uplink_bytes_per_s=1e15),
        seed=seed,
    ).records


def find_profile(run: Run, pattern: str) -> Path | None:
    """The first file of the profiles' folder that matches, or None."""
    if run.profiles is None:
        return None
    return min(run.profiles.glob(pattern), default=None)


def not_run(part: str, pattern: str) -> Finding:
    """A part without its files misses a target, so null keys cannot pass for a result."""
    text = f"{part} not run: it needs {pattern} in the folder that --profiles names"
    missed = Target(promise=f"{part} is run", measured="its files are missing", held=False)
    return Finding(tables=(), targets=(missed,), notes=(text,))
