"""One simulation of a plan, or of one phase of it, at one rate; and the highest rate it serves.

A phase is simulated alone, as DistServe does (OSDI'24, algorithm 1), by giving the other phase to a
worker that takes no time: the same router, workers and hand-off, and nothing else to wait for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf

from engine.latency.base import StepShape
from router.config import RouterConfig
from simulator.cluster import Cluster
from simulator.plan.types import Affinity, Goodput, Option, Plan, Pool, Problem
from simulator.spec import NetworkSpec, PoolRole, PoolSpec, SimSpec
from simulator.summary import SHARES, summarise
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest

_INSTANT_S = 1e-6
_FAST_BYTES_PER_S = 1e15
_FAST_TOKENS = 1 << 18
_DECODE_STEP_TOKENS = 512
_MOST_DOUBLINGS = 6
_PHASE_WIDTH = 0.1
"""Phases alone only decide which plans are simulated whole."""


class Judged(StrEnum):
    """Which of the targets count."""

    TTFT = "ttft"
    TPOT = "tpot"
    BOTH = "both"


@dataclass(frozen=True, slots=True)
class InstantLatency:
    """Implements LatencyModel: a step takes a microsecond, whatever is in it."""

    def step_s(self, shape: StepShape) -> float:
        return _INSTANT_S

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        return steps * _INSTANT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is simulated, which targets count, and a rate to begin the search at."""

    pools: tuple[PoolSpec, ...]
    router: RouterConfig
    network: NetworkSpec
    judged: Judged
    guess_rps: float
    run_s: float = 0.0


# -- what is simulated --------------------------------------------------------------------------


def prefill_setup(problem: Problem, option: Option, step_tokens: int) -> Setup:
    """One prefill worker, and decodes that take no time."""
    worker = _worker(problem, Pool(option=option, step_tokens=step_tokens, workers=1))
    return _phase(
        worker, _instant(problem), Judged.TTFT, 0.7 / mean_prefill_s(problem, option, step_tokens)
    )


def decode_setup(problem: Problem, option: Option) -> Setup:
    """One decode worker, and prefills that take no time."""
    worker = _worker(problem, Pool(option=option, step_tokens=_DECODE_STEP_TOKENS, workers=1))
    return _phase(_instant(problem), worker, Judged.TPOT, _decode_guess_rps(problem, option))


def plan_setup(
    problem: Problem, plan: Plan, guess_rps: float, *, run_s: float | None = None
) -> Setup:
    """All pools of one copy of the plan, with the production router."""
    roles = [PoolRole.COLOCATED] if plan.decode is None else [PoolRole.PREFILL, PoolRole.DECODE]
    return Setup(
        pools=tuple(
            PoolSpec(name=str(role), role=role, workers=pool.workers, worker=_worker(problem, pool))
            for role, pool in zip(roles, plan.pools, strict=True)
        ),
        router=problem.router,
        network=NetworkSpec(),
        judged=Judged.BOTH,
        guess_rps=guess_rps,
        run_s=problem.run_s if run_s is None else run_s,
    )


def _phase(prefill: WorkerSpec, decode: WorkerSpec, judged: Judged, guess_rps: float) -> Setup:
    return Setup(
        pools=(
            PoolSpec(name="prefill", role=PoolRole.PREFILL, workers=1, worker=prefill),
            PoolSpec(name="decode", role=PoolRole.DECODE, workers=1, worker=decode),
        ),
        router=RouterConfig(admission="off", local_prefill=False),
        network=NetworkSpec(control_s=0.0),
        judged=judged,
        guess_rps=guess_rps,
    )


def _worker(problem: Problem, pool: Pool) -> WorkerSpec:
    option = pool.option
    return WorkerSpec(
        latency=option.latency,
        kv_blocks=option.kv_tokens // problem.block_size,
        block_size=problem.block_size,
        step_tokens=pool.step_tokens,
        max_batch=problem.max_batch,
        kv_bytes_per_token=problem.kv_bytes_per_token,
        nic_bytes_per_s=(
            option.nvlink_bytes_per_s
            if problem.affinity is Affinity.LOW
            else option.nic_bytes_per_s
        ),
        gpus=option.tp,
    )


def _instant(problem: Problem) -> WorkerSpec:
    return WorkerSpec(
        latency=InstantLatency(),
        kv_blocks=_FAST_TOKENS // problem.block_size,
        block_size=problem.block_size,
        step_tokens=_FAST_TOKENS,
        max_batch=problem.max_batch,
        kv_bytes_per_token=problem.kv_bytes_per_token,
        nic_bytes_per_s=_FAST_BYTES_PER_S,
    )


# -- guesses ------------------------------------------------------------------------------------


def mean_prefill_s(problem: Problem, option: Option, step_tokens: int) -> float:
    """Of the requests' prompts, each alone and nothing cached, in chunks of `step_tokens`."""
    sample = problem.requests[:200]
    total_s = 0.0
    for request in sample:
        for start in range(0, request.prompt_tokens, step_tokens):
            end = min(request.prompt_tokens, start + step_tokens)
            total_s += option.latency.step_s(StepShape(prefill=((start, end),)))
    return total_s / len(sample)


def _decode_guess_rps(problem: Problem, option: Option) -> float:
    """Half the rate at which as many run as memory, batch and TPOT allow."""
    sample = problem.requests[:200]
    context = sum(r.prompt_tokens + r.output_tokens / 2 for r in sample) / len(sample)
    outputs = sum(r.output_tokens for r in sample) / len(sample)
    batch = max(1, min(problem.max_batch, int(option.kv_tokens / context)))
    while batch > 1 and _step_s(option, batch, context) > problem.slo.tpot_s:
        batch = batch * 3 // 4
    return 0.5 * batch / (outputs * _step_s(option, batch, context))


def _step_s(option: Option, batch: int, context: float) -> float:
    return option.latency.decode_run_s(batch, int(batch * context), 1)


# -- running ------------------------------------------------------------------------------------


def offered(problem: Problem, rps: float, run_s: float) -> list[SimRequest]:
    """As many of the requests as come in `run_s`, stretched to the rate."""
    count = min(len(problem.requests), max(problem.phase_requests, int(rps * run_s)))
    taken = problem.requests[:count]
    span_s = taken[-1].at_s - taken[0].at_s
    stretch = (count - 1) / rps / span_s if span_s > 0 else 0.0
    first_s = taken[0].at_s
    return [replace(request, at_s=(request.at_s - first_s) * stretch) for request in taken]


def simulate(problem: Problem, setup: Setup, rps: float) -> Goodput:
    """How the requests fare at that rate."""
    spec = SimSpec(
        pools=setup.pools,
        router=setup.router,
        slo=problem.slo,
        network=setup.network,
        samples=0,
        seed=problem.seed,
    )
    outcome = Cluster(spec).run(offered(problem, rps, setup.run_s))
    summary = summarise(outcome, problem.slo, spec.gpus, warm_up=problem.warm_up)
    shares = {
        Judged.TTFT: summary.ttft_attainment,
        Judged.TPOT: summary.tpot_attainment,
        Judged.BOTH: summary.attainment,
    }
    p90 = SHARES.index(0.9)
    return Goodput(
        rps=rps,
        share=shares[setup.judged],
        ttft_p90_s=summary.ttft_s[p90] if summary.ttft_s else inf,
        tpot_p90_s=summary.tpot_s[p90] if summary.tpot_s else inf,
        hit_share=summary.hit_rate,
    )


def find_goodput(problem: Problem, setup: Setup) -> Goodput:
    """The highest rate that `share` of the requests is served at, by bisection: the attainment is
    taken to fall with the rate.
    """
    return highest(
        lambda rps: simulate(problem, setup, rps),
        share=problem.share,
        guess_rps=setup.guess_rps,
        width=problem.width if setup.judged is Judged.BOTH else max(problem.width, _PHASE_WIDTH),
    )


def highest(
    at: Callable[[float], Goodput], *, share: float, guess_rps: float, width: float
) -> Goodput:
    """Pure but for `at`. Doubles or halves from the guess until it has a bracket, then bisects it
    until its ends differ by the share `width`. Requests that come all at once fare the same at any
    rate: after a few doublings the rate reached is the answer.
    """
    found = at(guess_rps)
    high_rps, low = guess_rps, found if found.share >= share else None
    if low is None:
        for _ in range(_MOST_DOUBLINGS):
            found = at(high_rps / 2)
            if found.share >= share:
                low = found
                break
            high_rps /= 2
    else:
        for _ in range(_MOST_DOUBLINGS):
            high_rps = 2 * low.rps
            found = at(high_rps)
            if found.share < share:
                break
            low = found
        else:
            return low
    if low is None:
        return replace(found, rps=0.0)
    while high_rps > low.rps * (1 + width):
        found = at((low.rps + high_rps) / 2)
        if found.share >= share:
            low = found
        else:
            high_rps = found.rps
    return low
