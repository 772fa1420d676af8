"""DistServe's published simulator case (OSDI'24): OPT-13B on A100s, ShareGPT, 200/100 ms, P90.

Published: the best placement on a node of four is prefill TP 2, decode TP 1, 1.56 requests/s per
GPU (simdistserve's quick start), and the share of requests that keep both targets on that placement
at seven rates (table 2; the rates are per GPU, its three GPUs together serve three times as much:
simdistserve's alignment script offers 3 to 12 requests/s).

Step times are DistServe's own fits (Apache-2.0). Its prefill coefficients exist in two versions,
the released ones being 1.1 times those that its alignment script names; the quick start is compared
with the released ones, the seven points with those of the script.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import fmean

from benchmarks.types import BenchFailed
from engine.latency.fitted import PrefillCurve
from router.policies.base import Slo
from simulator.plan.search import Progress, search
from simulator.plan.trial import find_goodput, plan_setup, simulate
from simulator.plan.types import Affinity, Answer, Offer, Option, Plan, Pool, Problem
from simulator.profiles.published import DISTSERVE_KV_TOKENS, distserve_latency
from simulator.workload.types import SimRequest

PUBLISHED_RPS_PER_GPU = 1.56
PUBLISHED_PREFILL_TP, PUBLISHED_DECODE_TP = 2, 1
PUBLISHED_ATTAINMENT = {
    1.0: 1.0,
    1.5: 1.0,
    2.0: 0.993,
    2.5: 0.883,
    3.0: 0.841,
    3.5: 0.77,
    4.0: 0.689,
}
"""Simulated share of requests by rate per GPU, of the placement named DistServe-Low."""

_SLO = Slo(ttft_s=0.2, tpot_s=0.1)
_SHARE = 0.9
_GPU = "a100"
_GPUS = 4
_SCRIPT_TO_RELEASED = 1.1
_OVERHEAD_S, _OVERHEAD_PER_TOKEN_S = 2e-3, 1e-7
"""Of a step of its engine, in the released fits alone."""

_REQUESTS = 600
_POINT_REQUESTS = 300
"""Of a run of the alignment script, whose decode batches no memory bounds."""

_UNBOUNDED_TOKENS = 1 << 20
_BLOCK_SIZE = 16
_KV_BYTES_PER_TOKEN = 819_200
_NVLINK_BYTES_PER_S = 300e9
_NIC_BYTES_PER_S = 25e9
_WHOLE_PROMPTS = 1 << 20
"""DistServe batches prompts and cuts none, so a step takes all that wait."""

_SHARES = (0, 0.05, 0.1, 0.15, 0.25, 0.33, 0.4, 0.5, 0.58, 0.67, 0.75, 0.83, 0.9, 0.95, 0.98, 1)
_PROMPTS = (9, 31, 94, 181, 345, 469, 575, 760, 852, 1013, 1170, 1361, 1513, 1728, 1830, 2003)
_OUTPUTS = (2, 5, 9, 12, 18, 28, 36, 68, 138, 219, 279, 373, 479, 609, 817, 1085)
"""Lengths at these shares of the 300 ShareGPT requests that DistServe's alignment data replays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """One published point and ours, a mean over seeds."""

    rps_per_gpu: float
    published: float
    simulated: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DistServeCase:
    """What the search found on DistServe's inputs, and the published points beside ours."""

    rps_per_gpu: float
    prefill_tp: int
    decode_tp: int
    answer: Answer
    attainment: tuple[Attainment, ...]

    @property
    def is_published_plan(self) -> bool:
        """The same degrees of tensor parallelism as published."""
        return (self.prefill_tp, self.decode_tp) == (PUBLISHED_PREFILL_TP, PUBLISHED_DECODE_TP)

    @property
    def worst_attainment_error(self) -> float:
        """The largest difference to a published point, as a share of the requests."""
        return max(abs(point.simulated - point.published) for point in self.attainment)


def distserve_case(
    recorded: Sequence[SimRequest] = (),
    *,
    seeds: int = 5,
    processes: int = 1,
    progress: Progress = lambda text, done, total: None,
) -> DistServeCase:
    """Search and points. With `recorded` requests (`read_recorded`) the points replay them, their
    arrivals stretched, and the search draws its lengths from them; without, lengths are drawn from
    the quantiles above and arrivals are Poisson's. Raises BenchFailed when no plan is found.
    """
    answer = search(_problem(recorded, seed=0), processes=processes, progress=progress)
    if not answer.best or answer.best[0].plan.decode is None:
        raise BenchFailed("DistServe's case: no plan keeps its targets")
    best = answer.best[0]
    rates = [best.rps_per_gpu]
    for seed in range(1, seeds):
        progress(f"the best plan, seed {seed}", seed, seeds)
        problem = _problem(recorded, seed=seed)
        goodput = find_goodput(problem, plan_setup(problem, best.plan, best.goodput.rps))
        rates.append(goodput.rps / best.plan.gpus)
    return DistServeCase(
        rps_per_gpu=fmean(rates),
        prefill_tp=best.plan.prefill.option.tp,
        decode_tp=answer.best[0].plan.decode.option.tp,
        answer=answer,
        attainment=tuple(attainment(recorded, seeds=seeds)),
    )


def attainment(recorded: Sequence[SimRequest] = (), *, seeds: int = 5) -> list[Attainment]:
    """The seven points, on the published placement."""
    problems = [_problem(recorded, seed=seed, is_script=True) for seed in range(seeds)]
    points: list[Attainment] = []
    for rate, published in PUBLISHED_ATTAINMENT.items():
        shares: list[float] = []
        for problem in problems:
            plan = _published_plan(problem)
            setup = plan_setup(problem, plan, rate)
            shares.append(simulate(problem, setup, rate * plan.gpus).share)
        points.append(Attainment(rps_per_gpu=rate, published=published, simulated=fmean(shares)))
    return points


def read_recorded(file: Path) -> tuple[SimRequest, ...]:
    """A workload file of DistServe's alignment data: a JSON list of prompt_len, output_len and
    start_time in seconds. Raises BenchFailed.
    """
    try:
        return tuple(
            SimRequest(
                at_s=float(row["start_time"]),
                prompt_tokens=int(row["prompt_len"]),
                output_tokens=int(row["output_len"]),
            )
            for row in json.loads(file.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchFailed(
            f"{file} is no workload of DistServe's alignment data: {error}"
        ) from error


def draw_lengths(random: Random) -> tuple[int, int]:
    """A prompt and an output, which hardly depend on each other there (correlation -0.12)."""
    return _quantile(_PROMPTS, random.random()), _quantile(_OUTPUTS, random.random())


def _quantile(values: Sequence[int], share: float) -> int:
    i = min(bisect_right(_SHARES, share), len(_SHARES) - 1)
    (x0, x1), (y0, y1) = list(pairwise(_SHARES))[i - 1], list(pairwise(values))[i - 1]
    return round(y0 + (y1 - y0) * (share - x0) / (x1 - x0))


def _published_plan(problem: Problem) -> Plan:
    by_tp = {option.tp: option for option in problem.options}
    prefill, decode = by_tp[PUBLISHED_PREFILL_TP], by_tp[PUBLISHED_DECODE_TP]
    return Plan(
        prefill=Pool(option=prefill, step_tokens=_WHOLE_PROMPTS, workers=1),
        decode=Pool(option=decode, step_tokens=_WHOLE_PROMPTS, workers=1),
    )


def _problem(recorded: Sequence[SimRequest], *, seed: int, is_script: bool = False) -> Problem:
    return Problem(
        options=tuple(_option(tp, is_script=is_script) for tp in DISTSERVE_KV_TOKENS),
        offers=(Offer(gpu=_GPU, count=_GPUS),),
        gpus=_GPUS,
        slo=_SLO,
        share=_SHARE,
        requests=(tuple(recorded) if is_script and recorded else _requests(recorded, seed)),
        block_size=_BLOCK_SIZE,
        kv_bytes_per_token=_KV_BYTES_PER_TOKEN,
        affinity=Affinity.LOW,
        node_gpus=_GPUS,
        chunks=(_WHOLE_PROMPTS,),
        max_batch=1024,
        phase_requests=_POINT_REQUESTS if is_script else _REQUESTS,
        run_s=0.0,
        warm_up=0.0,
        seed=seed,
    )


def _requests(recorded: Sequence[SimRequest], seed: int) -> tuple[SimRequest, ...]:
    random, at_s, requests = Random(seed), 0.0, list[SimRequest]()
    for _ in range(_REQUESTS):
        if recorded:
            requests.append(replace(random.choice(recorded), at_s=at_s))
        else:
            prompt, output = draw_lengths(random)
            requests.append(SimRequest(at_s=at_s, prompt_tokens=prompt, output_tokens=output))
        at_s += random.expovariate(1.0)
    return tuple(requests)


def _option(tp: int, *, is_script: bool) -> Option:
    latency = distserve_latency("opt-13b", tp)
    if is_script:
        curve = latency.prefill
        script = PrefillCurve(
            base_s=(curve.base_s - _OVERHEAD_S) / _SCRIPT_TO_RELEASED,
            per_token_s=(curve.per_token_s - _OVERHEAD_PER_TOKEN_S) / _SCRIPT_TO_RELEASED,
            per_pair_s=curve.per_pair_s / _SCRIPT_TO_RELEASED,
        )
        latency = replace(latency, prefill=script)
    return Option(
        gpu=_GPU,
        tp=tp,
        latency=latency,
        kv_tokens=_UNBOUNDED_TOKENS if is_script else DISTSERVE_KV_TOKENS[tp],
        nic_bytes_per_s=tp * _NIC_BYTES_PER_S,
        nvlink_bytes_per_s=tp * _NVLINK_BYTES_PER_S,
    )
