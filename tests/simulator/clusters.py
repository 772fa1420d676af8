"""Small simulated clusters whose times can be told by hand."""

from collections.abc import Sequence
from dataclasses import replace

from core.ids import BlockHash
from engine.latency.base import StepShape
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster, Outcome
from simulator.spec import NetworkSpec, PoolRole, PoolSpec, SimSpec
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest

BLOCK = 16


class Plain:
    """Implements LatencyModel: a millisecond per prompt token, ten per step that decodes."""

    def step_s(self, shape: StepShape) -> float:
        decode_s = 0.01 if shape.decode_sequences else 0.0
        return decode_s + sum(end - start for start, end in shape.prefill) / 1e3

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        return 0.01 * steps


WORKER = WorkerSpec(
    latency=Plain(),
    kv_blocks=200,
    block_size=BLOCK,
    step_tokens=64,
    kv_bytes_per_token=1_000,
    nic_bytes_per_s=1e9,
)


def pool(role: PoolRole, workers: int, worker: WorkerSpec = WORKER, name: str = "") -> PoolSpec:
    return PoolSpec(name=name or role.value, role=role, workers=workers, worker=worker)


def split(prefill: int = 1, decode: int = 1, worker: WorkerSpec = WORKER) -> SimSpec:
    """A pool of each kind, admission off."""
    return SimSpec(
        pools=(pool(PoolRole.PREFILL, prefill, worker), pool(PoolRole.DECODE, decode, worker)),
        slo=Slo(ttft_s=1.0, tpot_s=0.1),
        router=RouterConfig(admission="off"),
        network=NetworkSpec(control_s=0.001),
    )


def colocated(workers: int = 1) -> SimSpec:
    return replace(split(), pools=(pool(PoolRole.COLOCATED, workers),))


def ask(at_s: float = 0.0, prompt: int = 160, output: int = 11, family: int = 0) -> SimRequest:
    """Prompts of one family share their blocks; family 0 shares none."""
    hashes = tuple(BlockHash(bytes([family, i + 1]) + bytes(14)) for i in range(prompt // BLOCK))
    return SimRequest(at_s, prompt, output, hashes if family else ())


def run(spec: SimSpec, requests: Sequence[SimRequest]) -> Outcome:
    return Cluster(spec).run(requests)


def check_idle(cluster: Cluster) -> None:
    """Nothing runs any more, and no block is lost."""
    for pool in cluster._pools.values():
        for slot in pool.slots:
            if slot.member is not None:
                slot.member.worker.pool.check()
                slot.member.worker.pool.check_idle()
