"""What rows share: seeds, paired differences, and how they are written and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from operator import sub
from typing import TYPE_CHECKING, Any

from benchmarks.types import Json
from core.estimate import Estimate
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEDS = 5
QUICK_SEEDS = 2
_BEYOND_KERNELS = 1.15e-3
"""Seconds per ms of kernels."""


def kernel_latency(
    prefill: tuple[float, float, float], decode: tuple[float, float, float]
) -> FittedLatency:
    """Of sums of measured vLLM kernels (NVIDIA's aiconfigurator, systems/data) fitted to lines, in
    ms, and 15 % on top for what is not in kernels. Prefill: of a step, per token and per token
    squared; decode: of a step, per sequence and per token of context.
    """
    base, token, token2 = (_BEYOND_KERNELS * ms for ms in prefill)
    step, sequence, context_token = (_BEYOND_KERNELS * ms for ms in decode)
    return FittedLatency(
        prefill=PrefillCurve(base_s=base, per_token_s=token, per_pair_s=2 * token2),
        decode=(
            DecodeCurve(base_s=step, per_sequence_s=sequence, per_context_token_s=context_token),
        ),
    )


LLAMA_8B_H100 = kernel_latency((3.91, 0.01424, 7.56e-7), (6.12, 0.0091, 4.21e-5))


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


def percent(shares: Sequence[float]) -> Estimate:
    """Of shares, by seed."""
    return Estimate.of([100 * share for share in shares])


def column(fares: Sequence[object], name: str) -> list[float]:
    """One measure of each seed's fare."""
    return [getattr(fare, name) for fare in fares]


def plot(axes: Axes, xs: Sequence[Any], estimates: Sequence[Estimate], **style: Any) -> None:
    """Means and their intervals."""
    means, halves = [e.mean for e in estimates], [e.half for e in estimates]
    axes.errorbar(xs, means, yerr=halves, **style)


def as_json(estimate: Estimate) -> dict[str, Json]:
    """For the JSON object."""
    return {"mean": estimate.mean, "half": estimate.half}
