"""The same seed gives the same bytes, in this process and in another one."""

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from benchmarks.types import Finding, Part, Run, Target
from benchmarks.validate.rig import make_worker, split_pools
from engine.latency.devices import find_device
from engine.latency.roofline import RooflineLatency
from engine.latency.shapes import find_shape
from kv_transfer.config import TransferConfig
from router.policies.base import Slo
from simulator.cluster import Cluster
from simulator.spec import Failure, SimSpec
from simulator.workload.build import Shaping
from simulator.workload.load import load_workload

_SOURCE = "gamma:rate=60,cv=3,prompt=2000,output=150,spread=0.8,shared=1024"
_TIMEOUT_S = 120.0


def digest(seed: int, count: int) -> str:
    """Of all records of a run in which nearly every choice has alternatives."""
    workload = load_workload(_SOURCE, Shaping(seed=seed, requests=count)).workload
    records = Cluster(_spec(seed)).run(workload.requests).records
    text = "\n".join(map(repr, records))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _spec(seed: int) -> SimSpec:
    """Several routers that draw, hear of loads late, and lose workers of both kinds."""
    latency = RooflineLatency(model=find_shape("llama-3-8b"), device=find_device("h100"))
    worker = make_worker(
        latency,
        kv_tokens=100_000,
        block_size=512,
        step_tokens=2048,
        max_batch=64,
        kv_bytes_per_token=131_072,
        link_bytes_per_s=50e9,
    )
    return SimSpec(
        pools=split_pools(3, 5, worker, worker),
        slo=Slo(ttft_s=2.0, tpot_s=0.05),
        routers=3,
        report_s=0.1,
        transfer=TransferConfig(),
        failures=(
            Failure(at_s=2.0, pool="decode", worker=0, restart_s=3.0),
            Failure(at_s=3.0, pool="prefill", worker=1, silent=True),
        ),
        samples=0,
        seed=seed,
    )


def _run(run: Run) -> Finding:
    count = 300 if run.quick else 2000
    here = [digest(0, count), digest(0, count)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(digest, 0, count).result(timeout=_TIMEOUT_S)
    same, other = len({*here, there}) == 1, digest(1, count)
    return Finding(
        tables=(),
        targets=(
            Target(
                promise="the same seed gives the same bytes, here and in another process",
                measured=f"{here[0][:8]} {here[1][:8]} {there[:8]}, another seed {other[:8]}",
                held=same and other != here[0],
            ),
        ),
        keys={"deterministic": same},
    )


PART = Part(
    name="determinism",
    what="the same seed twice, and in another process",
    keys=("deterministic",),
    run=_run,
)
