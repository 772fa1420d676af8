"""What rows share: seeds, paired differences, and how they are written."""

from collections.abc import Sequence
from itertools import starmap
from operator import sub

from benchmarks.numbers import Estimate
from benchmarks.types import Json
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve

SEEDS = 5
QUICK_SEEDS = 2
_BEYOND_KERNELS = 1.15e-3
"""Seconds per ms of kernels."""
LLAMA_8B_H100 = FittedLatency(
    prefill=PrefillCurve(
        base_s=3.91 * _BEYOND_KERNELS,
        per_token_s=0.01424 * _BEYOND_KERNELS,
        per_pair_s=2 * 7.56e-7 * _BEYOND_KERNELS,
    ),
    decode=(
        DecodeCurve(
            base_s=6.12 * _BEYOND_KERNELS,
            per_sequence_s=0.0091 * _BEYOND_KERNELS,
            per_context_token_s=4.21e-5 * _BEYOND_KERNELS,
        ),
    ),
)
"""Sums of measured vLLM kernels (NVIDIA's aiconfigurator, systems/data) fitted to lines, and 15 %
on top for what is not in kernels."""


def seeds_of(quick: bool) -> range:
    """The seeds of a full or a quick run."""
    return range(QUICK_SEEDS if quick else SEEDS)


def difference(mine: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mine less the others', seed by seed."""
    return Estimate.of(list(starmap(sub, zip(mine, others, strict=True))))


def ratio(mine: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mine by the others', seed by seed."""
    return Estimate.of([a / b for a, b in zip(mine, others, strict=True)])


def show(estimate: Estimate, digits: int = 2) -> str:
    """With the half width of its interval."""
    return f"{estimate.mean:.{digits}f} +- {estimate.half:.{digits}f}"


def as_json(estimate: Estimate) -> dict[str, Json]:
    """For the JSON object."""
    return {"mean": estimate.mean, "half": estimate.half}
