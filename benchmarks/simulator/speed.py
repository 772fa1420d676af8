"""Part `speed`: requests simulated per second of CPU, and the memory they take.

Each size runs in a process of its own, so its peak memory is its own. Requests share prefixes as
conversations do: a turn repeats the blocks of the one before it, in blocks of 512 tokens.
"""

from __future__ import annotations

import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context
from random import Random
from typing import TYPE_CHECKING

from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import split_pools
from core.ids import BlockHash
from engine.config import TimedConfig
from engine.latency.fitted import FittedLatency
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster
from simulator.spec import SimSpec
from simulator.summary import summarise
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLOCK = 512
_STEP_TOKENS = 2048
_KV_BLOCKS = 800
_TURNS = 8
_PREFILL_SHARE = 3 / 8
_RATE_PER_WORKER = 0.9
"""Near the knee of this workload."""


@dataclass(frozen=True, slots=True)
class _Size:
    requests: int
    workers: int
    limit_s: float


_FULL = (_Size(100_000, 64, 60.0), _Size(600_000, 10_000, 600.0))
_QUICK = (_Size(8_000, 64, 60.0 * 8_000 / 100_000), _Size(8_000, 1_000, 600.0 * 8_000 / 600_000))


@dataclass(frozen=True, slots=True)
class _Taken:
    """What a run took and gave; `cpu_s` without making the requests."""

    cpu_s: float
    wall_s: float
    events: int
    memory_mb: float
    attainment: float
    hit_rate: float


def run(run: Run) -> Finding:
    """One core: a run is one thread."""
    sizes = _QUICK if run.quick else _FULL
    taken: list[_Taken] = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for i, size in enumerate(sizes):
            text = f"{size.requests:,} requests on {size.workers:,} workers"
            run.progress(text, i, len(sizes))
            taken.append(pool.submit(_measure, size).result())
    rows = tuple(_row(size, one) for size, one in zip(sizes, taken, strict=True))
    return Finding(
        tables=(
            ResultTable(
                title="simulated requests",
                columns=(
                    *("workers", "requests", "CPU s", "requests per s", "events per request"),
                    *("peak MB", "kept", "cached"),
                ),
                texts=0,
                rows=rows,
            ),
        ),
        targets=tuple(
            Target(
                promise=f"{size.requests:,} requests on {size.workers:,} workers"
                f" within {size.limit_s:.3g} s of one core",
                measured=f"{one.cpu_s:.1f} s of CPU, {one.wall_s:.1f} s in all",
                held=one.cpu_s <= size.limit_s,
            )
            for size, one in zip(sizes, taken, strict=True)
        ),
        notes=(
            f"turns of conversations, prompts of {_BLOCK} to {8 * _TURNS * _BLOCK:,} tokens in"
            f" blocks of {_BLOCK}, answers of 50 to 600; {_PREFILL_SHARE:.0%} of the workers"
            f" prefill; {_STEP_TOKENS} tokens a step; true load, one router",
        ),
        keys=_keys(sizes, taken),
        draw=lambda axes: _draw(axes, sizes, taken),
    )


def _measure(size: _Size) -> _Taken:
    spec = _spec(size)
    requests = _requests(size)
    began_s, cpu_s = time.monotonic(), time.process_time()
    outcome = Cluster(spec).run(requests)
    wall_s, cpu_s = time.monotonic() - began_s, time.process_time() - cpu_s
    summary = summarise(outcome, spec.slo, spec.gpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _Taken(
        cpu_s=cpu_s,
        wall_s=wall_s,
        events=outcome.events,
        memory_mb=peak / (1 << 20 if sys.platform == "darwin" else 1 << 10),
        attainment=summary.attainment,
        hit_rate=summary.hit_rate,
    )


def _spec(size: _Size) -> SimSpec:
    worker = WorkerSpec(
        latency=FittedLatency.of(TimedConfig()),
        kv_blocks=_KV_BLOCKS,
        block_size=_BLOCK,
        step_tokens=_STEP_TOKENS,
    )
    prefill = round(size.workers * _PREFILL_SHARE)
    return SimSpec(
        pools=split_pools(prefill, size.workers - prefill, worker, worker),
        router=RouterConfig(admission="off"),
        slo=Slo(ttft_s=2.0, tpot_s=0.05),
        samples=100,
    )


def _requests(size: _Size) -> list[SimRequest]:
    """Sessions of up to `_TURNS` turns begin at random; each turn adds to the prompt before it."""
    random, requests = Random(0), list[SimRequest]()
    rate = _RATE_PER_WORKER * size.workers
    start_s, session = 0.0, 0
    while len(requests) < size.requests:
        at_s, tokens, hashes = start_s, 0, list[BlockHash]()
        for _ in range(random.randint(1, _TURNS)):
            tokens += random.randint(_BLOCK, 8 * _BLOCK)
            while len(hashes) < tokens // _BLOCK:
                digest = blake2b(b"%d/%d" % (session, len(hashes)), digest_size=16)
                hashes.append(BlockHash(digest.digest()))
            requests.append(SimRequest(at_s, tokens, random.randint(50, 600), tuple(hashes)))
            at_s += random.uniform(5.0, 60.0)
        start_s += random.expovariate(rate / ((_TURNS + 1) / 2))
        session += 1
    requests.sort(key=lambda request: request.at_s)
    return requests[: size.requests]


def _row(size: _Size, taken: _Taken) -> tuple[str, ...]:
    return (
        f"{size.workers:,}",
        f"{size.requests:,}",
        f"{taken.cpu_s:.1f}",
        f"{size.requests / taken.cpu_s:,.0f}",
        f"{taken.events / size.requests:.1f}",
        f"{taken.memory_mb:,.0f}",
        f"{taken.attainment:.1%}",
        f"{taken.hit_rate:.1%}",
    )


def _keys(sizes: tuple[_Size, ...], taken: list[_Taken]) -> dict[str, Json]:
    """The first three are of the first size, `sizes` are all."""
    every: list[Json] = [
        {
            "workers": size.workers,
            "requests": size.requests,
            "requests_per_s": size.requests / one.cpu_s,
            "cpu_s": one.cpu_s,
            "wall_s": one.wall_s,
            "memory_mb": one.memory_mb,
            "attainment": one.attainment,
        }
        for size, one in zip(sizes, taken, strict=True)
    ]
    return {
        "requests_per_s": sizes[0].requests / taken[0].cpu_s,
        "workers": sizes[0].workers,
        "memory_mb": taken[0].memory_mb,
        "sizes": every,
    }


def _draw(axes: Axes, sizes: tuple[_Size, ...], taken: list[_Taken]) -> None:
    labels = [f"{size.requests:,} on {size.workers:,} workers" for size in sizes]
    allowed = [1e6 * size.limit_s / size.requests for size in sizes]
    axes.bar(labels, allowed, color="lightgray", label="allowed")
    per_request = [1e6 * one.cpu_s / size.requests for size, one in zip(sizes, taken, strict=True)]
    axes.bar(labels, per_request, width=0.5, label="taken")
    axes.set(xlabel="requests", ylabel="us of CPU per request")
    axes.legend(fontsize=7)


PART = Part(
    name="speed",
    what="requests simulated per second, and the memory they take",
    keys=("requests_per_s", "workers", "memory_mb", "sizes"),
    run=run,
)
