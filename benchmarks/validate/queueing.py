"""One server with a fixed service time, and two in tandem: the formulas of DistServe, section 3.

    M/D/1    E[TTFT] = D + R D^2 / (2 (1 - R D))
    tandem   E[time] = D + R D^2 / (4 (2 - R D)), two stages of D / 2 each

The second is a prefill worker whose prompts take D / 2 and a decode worker that gives one token per
step of D / 2, one sequence at a time. Beside the formulas, which hold on average, every request is
compared with Lindley's recursion on the same arrivals, which holds exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

from benchmarks.types import Finding, Part, ResultTable, Run, Target
from benchmarks.validate.rig import make_worker, simulate
from core.estimate import Estimate
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from simulator.job import Record
from simulator.spec import PoolRole
from simulator.workload.arrivals import Constant, draw_arrivals
from simulator.workload.types import SimRequest

_SERVICE_S = 0.1
_PROMPT_TOKENS = 100
_BOUND = 0.02


@dataclass(frozen=True, slots=True)
class _System:
    name: str
    formula: Callable[[float, float], float]
    stages: int


def _md1_s(rate: float, service_s: float) -> float:
    return service_s + rate * service_s**2 / (2 * (1 - rate * service_s))


def _tandem_s(rate: float, service_s: float) -> float:
    return service_s + rate * service_s**2 / (4 * (2 - rate * service_s))


_SYSTEMS = (_System("M/D/1", _md1_s, 1), _System("tandem", _tandem_s, 2))


def _run(run: Run) -> Finding:
    loads = (0.5, 0.7) if run.quick else (0.3, 0.5, 0.7)
    count, seeds = (3000, 5) if run.quick else (5000, 6)
    rows, errors, worst_request = [], [], 0.0
    cases = [(system, load) for system in _SYSTEMS for load in loads]
    for i, (system, load) in enumerate(cases):
        run.progress(f"{system.name} at load {load:g}", i, len(cases))
        rate = load / _SERVICE_S
        means = []
        for seed in range(seeds):
            requests = _arrivals(rate, count, system.stages, seed)
            took = [_took_s(record, system.stages) for record in _simulate(requests, system.stages)]
            means.append(fmean(took))
            exact = _lindley(requests, system.stages)
            worst_request = max(worst_request, *map(_difference, took, exact))
        expected_s = system.formula(rate, _SERVICE_S)
        seen = Estimate.of(means)
        error = abs(seen.mean / expected_s - 1)
        errors.append(error)
        rows.append(
            (
                system.name,
                f"{load:g}",
                f"{expected_s * 1e3:.2f}",
                f"{seen.mean * 1e3:.2f} +- {seen.half * 1e3:.2f}",
                f"{error:.2%}",
            )
        )
    return Finding(
        tables=(
            ResultTable(
                title=f"simulated, {seeds} seeds of {count} requests, D = {_SERVICE_S * 1e3:g} ms",
                columns=("system", "load R D", "formula, ms", "mean, ms", "error"),
                texts=1,
                rows=tuple(rows),
            ),
        ),
        targets=(
            Target(
                promise=f"queueing formulas within {_BOUND:.0%}",
                measured=f"worst {max(errors):.2%}",
                held=max(errors) <= _BOUND,
            ),
            Target(
                promise="every request as Lindley's recursion has it",
                measured=f"worst difference {worst_request * 1e6:.3f} us",
                held=worst_request < 1e-6,
            ),
        ),
        keys={"md1_error": max(errors)},
    )


def _arrivals(rate: float, count: int, stages: int, seed: int) -> list[SimRequest]:
    """Poisson, stretched to the exact mean rate, so that the mean of a run is not off by luck."""
    times_s = draw_arrivals(Constant(rate), count, Random(seed))
    stretch = (count / rate) / times_s[-1]
    return [SimRequest(t_s * stretch, _PROMPT_TOKENS, stages) for t_s in times_s]


def _simulate(requests: Sequence[SimRequest], stages: int) -> tuple[Record, ...]:
    stage_s = _SERVICE_S / stages
    latency = FittedLatency(
        prefill=PrefillCurve(per_token_s=stage_s / _PROMPT_TOKENS),
        decode=(DecodeCurve(base_s=stage_s),),
    )
    first = make_worker(latency, step_tokens=_PROMPT_TOKENS)
    if stages == 1:
        return simulate(requests, {PoolRole.COLOCATED: first})
    second = make_worker(latency, max_batch=1)
    return simulate(requests, {PoolRole.PREFILL: first, PoolRole.DECODE: second})


def _took_s(record: Record, stages: int) -> float:
    return record.ttft_s if stages == 1 else record.end_s - record.at_s


def _lindley(requests: Sequence[SimRequest], stages: int) -> list[float]:
    """Time from arrival to the end of the last stage: a stage begins when the request is there and
    the stage is free.
    """
    stage_s, free_s = _SERVICE_S / stages, [0.0] * stages
    took = []
    for request in requests:
        now_s = request.at_s
        for stage in range(stages):
            now_s = max(now_s, free_s[stage]) + stage_s
            free_s[stage] = now_s
        took.append(now_s - request.at_s)
    return took


def _difference(a: float, b: float) -> float:
    return abs(a - b)


PART = Part(
    name="queueing",
    what="M/D/1 and a tandem of two, against their formulas",
    keys=("md1_error",),
    run=_run,
)
