"""One simulation of a plan, or of one phase of it, at one rate; and the highest rate it serves.

A phase is simulated alone, as DistServe does (OSDI'24, algorithm 1), by giving the other phase to a
worker that takes no time: the same router, workers and hand-off, and nothing else to wait for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import blake2b
from math import inf

from core.blocks import HASH_BYTES
from core.ids import BlockHash
from engine.latency.base import StepShape
from router.config import RouterConfig
from simulator.cluster import Cluster
from simulator.misses import Misses
from simulator.plan.fleet import phase_run_s, whole_run_s, whole_stay_s
from simulator.plan.types import Affinity, Goodput, Option, Plan, Pool, Problem
from simulator.spec import NetworkSpec, PoolRole, PoolSpec, SimSpec
from simulator.summary import SHARES, summarise
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest

_INSTANT_S = 1e-6
_FAST_BYTES_PER_S = 1e15
_FAST_TOKENS = 1 << 18
_DECODE_STEP_TOKENS = 512
_STEPS = (1.2, 1.5, 2.0, 4.0, 8.0)
_MOST_WARM_UP = 0.3
PHASE_WIDTH = 0.1
"""Phases alone only decide which plans are simulated whole."""


class Judged(StrEnum):
    """Which of the targets count."""

    TTFT = "ttft"
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
    width: float
    run_s: float
    warm_up: float
    """Share of the requests, the first ones, that is not counted: those of the first stay."""


# -- what is simulated --------------------------------------------------------------------------


def prefill_setup(problem: Problem, option: Option, step_tokens: int) -> Setup:
    """One prefill worker, and decodes that take no time."""
    worker = _worker(problem, Pool(option=option, step_tokens=step_tokens, workers=1))
    guess_rps = 0.7 / mean_prefill_s(problem, option, step_tokens)
    stay_s = problem.slo.ttft_s
    return _phase(
        problem, worker, _instant(problem), Judged.TTFT, guess_rps=guess_rps, stay_s=stay_s
    )


def decode_setup(problem: Problem, option: Option) -> Setup:
    """One decode worker, and prefills that take no time. Its TTFT is the wait for room on the
    worker, without which a full one would seem to serve any rate.
    """
    worker = _worker(problem, Pool(option=option, step_tokens=_DECODE_STEP_TOKENS, workers=1))
    guess_rps, stay_s = _decode_guess(problem, option)
    return _phase(
        problem, _instant(problem), worker, Judged.BOTH, guess_rps=guess_rps, stay_s=stay_s
    )


def plan_setup(problem: Problem, plan: Plan, guess_rps: float) -> Setup:
    """All pools of one copy of the plan, with the production router."""
    run_s = whole_run_s(problem)
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
        width=problem.width,
        run_s=run_s,
        warm_up=_warm_up(problem, whole_stay_s(problem), run_s),
    )


def _phase(
    problem: Problem,
    prefill: WorkerSpec,
    decode: WorkerSpec,
    judged: Judged,
    *,
    guess_rps: float,
    stay_s: float,
) -> Setup:
    run_s = phase_run_s(problem, guess_rps, stay_s)
    return Setup(
        pools=(
            PoolSpec(name="prefill", role=PoolRole.PREFILL, workers=1, worker=prefill),
            PoolSpec(name="decode", role=PoolRole.DECODE, workers=1, worker=decode),
        ),
        router=RouterConfig(admission="off", local_prefill=False, requeue=False),
        network=NetworkSpec(control_s=0.0),
        judged=judged,
        guess_rps=guess_rps,
        width=max(problem.width, PHASE_WIDTH),
        run_s=run_s,
        warm_up=_warm_up(problem, stay_s, run_s),
    )


def _warm_up(problem: Problem, stay_s: float, run_s: float) -> float:
    """Before the first requests have had time to leave, fewer run than at that rate."""
    return max(problem.warm_up, min(_MOST_WARM_UP, stay_s / run_s if run_s > 0 else 0.0))


def _worker(problem: Problem, pool: Pool) -> WorkerSpec:
    option = pool.option
    return WorkerSpec(
        latency=option.latency,
        kv_blocks=option.kv_tokens // problem.block_size,
        block_size=problem.block_size,
        step_tokens=pool.step_tokens,
        max_batch=problem.max_batch,
        kv_bytes_per_token=problem.kv_bytes_per_token,
        nic_bytes_per_s=kv_bytes_per_s(problem, option),
        gpus=option.tp,
        device=f"{option.tp} {option.gpu}",
    )


def kv_bytes_per_s(problem: Problem, option: Option) -> float:
    """What a worker's KV leaves it at: within a node it stays on NVLink."""
    low = problem.affinity is Affinity.LOW
    return option.nvlink_bytes_per_s if low else option.nic_bytes_per_s


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


def _decode_guess(problem: Problem, option: Option) -> tuple[float, float]:
    """The rate at which as many run as memory, batch and TPOT allow, and how long each stays."""
    sample = problem.requests[:200]
    context = sum(r.prompt_tokens + r.output_tokens / 2 for r in sample) / len(sample)
    outputs = sum(r.output_tokens for r in sample) / len(sample)
    batch = max(1, min(problem.max_batch, int(option.kv_tokens / context)))
    while batch > 1 and _step_s(option, batch, context) > problem.slo.tpot_s:
        batch = batch * 3 // 4
    stay_s = outputs * _step_s(option, batch, context)
    return batch / stay_s, stay_s


def _step_s(option: Option, batch: int, context: float) -> float:
    return option.latency.decode_run_s(batch, int(batch * context), 1)


# -- running ------------------------------------------------------------------------------------


def repeat(requests: Sequence[SimRequest], count: int) -> list[SimRequest]:
    """The first `count`; of too few, copies one after the other, each with blocks and sessions of
    its own.
    """
    gap_s = (requests[-1].at_s - requests[0].at_s) / max(1, len(requests) - 1)
    cycle_s = requests[-1].at_s - requests[0].at_s + gap_s
    return [_copy(requests[i % len(requests)], i // len(requests), cycle_s) for i in range(count)]


def _copy(request: SimRequest, number: int, cycle_s: float) -> SimRequest:
    if number == 0:
        return request
    salt = str(number).encode()
    return replace(
        request,
        at_s=request.at_s + number * cycle_s,
        hashes=tuple(
            BlockHash(blake2b(each, digest_size=HASH_BYTES, key=salt).digest())
            for each in request.hashes
        ),
        session=f"{request.session}.{number}" if request.session else "",
    )


def offered(problem: Problem, rps: float, run_s: float) -> list[SimRequest]:
    """As many requests as come in `run_s`, stretched to the rate."""
    count = max(problem.least_requests, int(rps * run_s))
    taken = repeat(problem.requests, count)
    span_s = taken[-1].at_s - taken[0].at_s
    stretch = (count - 1) / rps / span_s if span_s > 0 else 0.0
    first_s = taken[0].at_s
    return [replace(request, at_s=(request.at_s - first_s) * stretch) for request in taken]


def simulate(problem: Problem, setup: Setup, rps: float, *, only_if_kept: bool = False) -> Goodput:
    """How the requests fare at that rate. With `only_if_kept` a run that misses the share of the
    problem ends when that is sure: it answers for those that ended, and the share that it could
    have reached at most.
    """
    spec = SimSpec(
        pools=setup.pools,
        router=setup.router,
        slo=problem.slo,
        network=setup.network,
        samples=0,
        seed=problem.seed,
    )
    requests = offered(problem, rps, setup.run_s)
    skipped = int(setup.warm_up * len(requests))
    misses = Misses(
        problem.slo,
        since_s=requests[skipped].at_s,
        counted=len(requests) - skipped,
        share=problem.share,
        tpot=setup.judged is Judged.BOTH,
    )
    outcome = Cluster(spec).run(
        requests,
        enough=lambda record: misses.note(record) and only_if_kept,
        late=misses.late if only_if_kept else None,
    )
    if not only_if_kept or not misses.too_many:
        misses.never_ended(len(requests) - len(outcome.records))
    summary = summarise(outcome, problem.slo, spec.gpus, warm_up=setup.warm_up)
    p90 = SHARES.index(0.9)
    return Goodput(
        rps=rps,
        share=misses.share,
        ttft_p90_s=summary.ttft_s[p90] if summary.ttft_s else inf,
        tpot_p90_s=summary.tpot_s[p90] if summary.tpot_s else inf,
        hit_share=summary.hit_rate,
        refused_share=summary.outcomes.get("refused", 0) / max(1, summary.requests),
    )


def find_goodput(problem: Problem, setup: Setup) -> Goodput:
    """The highest rate that `share` of the requests is served at, by bisection: the attainment is
    taken to fall with the rate.
    """
    most = max(problem.least_requests, problem.most_requests)
    return highest(
        lambda rps: simulate(problem, setup, rps, only_if_kept=True),
        share=problem.share,
        guess_rps=setup.guess_rps,
        width=setup.width,
        most_rps=most / setup.run_s if setup.run_s > 0 else inf,
    )


def highest(
    at: Callable[[float], Goodput],
    *,
    share: float,
    guess_rps: float,
    width: float,
    most_rps: float = inf,
) -> Goodput:
    """Pure but for `at`. Goes up or down from the guess, in steps that grow and not above
    `most_rps`, until it has a bracket, then bisects it until its ends differ by the share `width`.
    Without a bracket after the last step, as when requests come all at once and fare the same at
    any rate, the answer is at least the rate reached.
    """
    found = at(min(guess_rps, most_rps))
    high_rps, low = found.rps, found if found.share >= share else None
    if low is None:
        for factor in _STEPS:
            found = at(high_rps / factor)
            if found.share >= share:
                low = found
                break
            high_rps /= factor
    else:
        for factor in _STEPS:
            high_rps = min(factor * low.rps, most_rps)
            if high_rps <= low.rps:
                return replace(low, at_least=True)
            found = at(high_rps)
            if found.share < share:
                break
            low = found
        else:
            return replace(low, at_least=True)
    if low is None:
        return replace(found, rps=0.0)
    while high_rps > low.rps * (1 + width):
        found = at((low.rps + high_rps) / 2)
        if found.share >= share:
            low = found
        else:
            high_rps = found.rps
    return low
