"""DistServe's published simulator case (OSDI'24): OPT-13B on A100s, ShareGPT, 200/100 ms, P90.

Published: the best placement on a node of four is prefill TP 2, decode TP 1, 1.56 requests/s per
GPU (simdistserve's quick start), and the share of requests that keep both targets on that placement
at seven rates (table 2; the rates are per GPU, its three GPUs together serve three times as much:
simdistserve's alignment script offers 3 to 12 requests/s).

Step times are DistServe's own fits (Apache-2.0). Its prefill coefficients exist in two versions,
the released ones being 1.1 times those that its alignment script names; the quick start is compared
with the released ones, the seven points with those of the script.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from router.policies.base import Slo
from simulator.plan.search import Progress, search
from simulator.plan.trial import plan_setup, simulate
from simulator.plan.types import Answer, Offer, Option, Plan, Pool, Problem
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


@dataclass(frozen=True, slots=True)
class _Fit:
    """Milliseconds: per step, per token, per squared prompt; per step, context token, sequence."""

    tp: int
    prefill: tuple[float, float, float]
    small: tuple[float, float, float]
    large: tuple[float, float, float]
    kv_tokens: int


_LARGE_FROM = 95
_FITS = (
    _Fit(1, (18.10, 0.1019, 7.12e-6), (19.93, 6.27e-4, 0.0385), (7.17, 5.80e-4, 0.158), 66_144),
    _Fit(2, (14.74, 0.0686, 2.45e-6), (13.29, 3.41e-4, 0.0630), (10.64, 3.12e-4, 0.0856), 163_008),
    _Fit(4, (12.06, 0.0381, 5.2e-7), (10.26, 1.88e-4, 0.0327), (10.48, 1.71e-4, 0.0457), 356_736),
)


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
    lengths: Sequence[tuple[int, int]] | None = None,
    *,
    seeds: int = 5,
    processes: int = 1,
    progress: Progress = lambda text, done, total: None,
) -> DistServeCase:
    """Search and points on (prompt, output) lengths drawn with Poisson arrivals; without `lengths`
    from the quantiles above. Takes about 15 s of CPU.
    """
    answer = search(_problem(lengths, seed=0), processes=processes, progress=progress)
    best = answer.best[0].plan if answer.best else None
    return DistServeCase(
        rps_per_gpu=answer.best[0].rps_per_gpu if answer.best else 0.0,
        prefill_tp=best.prefill.option.tp if best is not None else 0,
        decode_tp=best.decode.option.tp if best is not None and best.decode is not None else 0,
        answer=answer,
        attainment=tuple(attainment(lengths, seeds=seeds)),
    )


def attainment(
    lengths: Sequence[tuple[int, int]] | None = None, *, seeds: int = 5
) -> list[Attainment]:
    """The seven points, on the published placement."""
    problems = [
        _problem(lengths, seed=seed, prefill_scale=1 / _SCRIPT_TO_RELEASED) for seed in range(seeds)
    ]
    points: list[Attainment] = []
    for rate, published in PUBLISHED_ATTAINMENT.items():
        shares: list[float] = []
        for problem in problems:
            plan = _published_plan(problem)
            setup = plan_setup(problem, plan, rate)
            shares.append(simulate(problem, setup, rate * plan.gpus).share)
        points.append(
            Attainment(rps_per_gpu=rate, published=published, simulated=sum(shares) / len(shares))
        )
    return points


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


def _problem(
    lengths: Sequence[tuple[int, int]] | None, *, seed: int, prefill_scale: float = 1.0
) -> Problem:
    return Problem(
        options=tuple(_option(fit, prefill_scale) for fit in _FITS),
        offers=(Offer(gpu=_GPU, count=_GPUS),),
        gpus=_GPUS,
        slo=_SLO,
        share=_SHARE,
        requests=_requests(lengths, seed),
        block_size=_BLOCK_SIZE,
        kv_bytes_per_token=_KV_BYTES_PER_TOKEN,
        node_gpus=_GPUS,
        chunks=(_WHOLE_PROMPTS,),
        max_batch=1024,
        run_s=300.0,
        seed=seed,
    )


def _requests(lengths: Sequence[tuple[int, int]] | None, seed: int) -> tuple[SimRequest, ...]:
    random, at_s, requests = Random(seed), 0.0, list[SimRequest]()
    for _ in range(1500):
        prompt, output = draw_lengths(random) if lengths is None else random.choice(lengths)
        requests.append(SimRequest(at_s=at_s, prompt_tokens=prompt, output_tokens=output))
        at_s += random.expovariate(1.0)
    return tuple(requests)


def _option(fit: _Fit, prefill_scale: float) -> Option:
    base, per_token, per_square = (prefill_scale * ms / 1e3 for ms in fit.prefill)
    return Option(
        gpu=_GPU,
        tp=fit.tp,
        latency=FittedLatency(
            prefill=PrefillCurve(base_s=base, per_token_s=per_token, per_pair_s=2 * per_square),
            decode=(_decode(fit.small, 0), _decode(fit.large, _LARGE_FROM)),
        ),
        kv_tokens=fit.kv_tokens,
        nic_bytes_per_s=fit.tp * _NIC_BYTES_PER_S,
        nvlink_bytes_per_s=fit.tp * _NVLINK_BYTES_PER_S,
    )


def _decode(curve: tuple[float, float, float], from_sequences: int) -> DecodeCurve:
    base, per_context_token, per_sequence = (ms / 1e3 for ms in curve)
    return DecodeCurve(
        base_s=base,
        per_sequence_s=per_sequence,
        per_context_token_s=per_context_token,
        from_sequences=from_sequences,
    )
