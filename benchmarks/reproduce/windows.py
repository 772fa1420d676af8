"""What rows that replay a trace are asked: a window of its own for each seed.

Seeds begin where the one before ended, as long as the file lasts, so they differ in their requests
and not only in the times within its buckets. Without a file prompts are drawn like those of
Mooncake's conversation trace (benchmarks/routing/synthetic.py).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from benchmarks.routing.synthetic import BLOCK_TOKENS, synthetic_prompts
from benchmarks.types import BenchFailed, Run
from engine.latency.base import LatencyModel, StepShape
from simulator.workload.build import Shaping
from simulator.workload.load import load_workload
from simulator.workload.records import trace_name
from simulator.workload.types import SimRequest

BLOCK = BLOCK_TOKENS
"""Tokens per block of Mooncake's traces, which are what these rows replay."""
DRAWN = "drawn prompts"
CONVERSATION, SYNTHETIC = "mooncake_conversation", "mooncake_synthetic"


def find_trace(run: Run, name: str) -> Path | None:
    """The trace of that name among those given, or None."""
    return next((path for path in run.traces if trace_name(path) == name), None)


def window_of(trace: Path | None, seed: int, count: int) -> list[SimRequest]:
    """`count` requests, from 0 s on, at the trace's own rate. The window of seed i is the i-th, and
    wraps when the file has no more. Raises BenchFailed when it is not in blocks of 512 tokens.
    """
    if trace is None:
        prompts = synthetic_prompts(count, seed)
        requests: Sequence[SimRequest] = [
            SimRequest(p.at_s, p.tokens, 1, p.hashes) for p in prompts
        ]
    else:
        everything = _load(trace, seed)
        windows = max(1, len(everything) // count)
        start = seed % windows * count
        requests = everything[start : start + count]
    begin_s = requests[0].at_s
    return [replace(r, at_s=r.at_s - begin_s, session="", think_s=None) for r in requests]


@lru_cache(maxsize=6)
def _load(trace: Path, seed: int) -> tuple[SimRequest, ...]:
    workload = load_workload(trace, Shaping(seed=seed)).workload
    if workload.block_size != BLOCK:
        raise BenchFailed(f"{trace} is in blocks of {workload.block_size} tokens, not {BLOCK}")
    return workload.requests


def prompts_alone(requests: Sequence[SimRequest]) -> list[SimRequest]:
    """The same prompts, each for one token: nothing decodes."""
    return [replace(request, output_tokens=1) for request in requests]


def at_rate(requests: Sequence[SimRequest], scale: float) -> list[SimRequest]:
    """All gaps divided by `scale`."""
    return [replace(request, at_s=request.at_s / scale) for request in requests]


def at_load(
    requests: Sequence[SimRequest], load: float, workers: int, latency: LatencyModel
) -> list[SimRequest]:
    """At the rate at which, without any cache, the prompts would be `load` of what the workers can
    compute.
    """
    work_s = sum(latency.step_s(StepShape([(0, r.prompt_tokens)])) for r in requests)
    span_s = requests[-1].at_s - requests[0].at_s
    return at_rate(requests, load * workers * span_s / work_s)


def trace_title(trace: Path | None) -> str:
    """What tables call it."""
    return DRAWN if trace is None else trace_name(trace)
