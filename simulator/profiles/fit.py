"""Coefficients from measured steps.

Least squares of the *relative* error, as DistServe weighs it (OSDI'24, its simulator), so that
short steps count as much as long ones. No coefficient is negative: a term that would be is left out
and the others are fitted again.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from simulator.profiles.types import BadProfile, DecodePoint, Measured, PrefillPoint

LEAST_STEPS = 3
"""Of each phase: so many coefficients it has."""

Floats = npt.NDArray[np.float64]


def fit_latency(measured: Measured) -> FittedLatency:
    """The fitted model nearest to what was measured. Raises BadProfile with too few points."""
    return FittedLatency(
        prefill=fit_prefill(measured.prefill), decode=(fit_decode(measured.decode),)
    )


def fit_prefill(points: Sequence[PrefillPoint]) -> PrefillCurve:
    """a + b * tokens + h * pairs."""
    if len(points) < LEAST_STEPS:
        raise BadProfile(f"{len(points)} prefill steps are too few for {LEAST_STEPS} coefficients")
    features = [
        (1.0, point.end - point.start, (point.end - point.start) * (point.start + point.end) / 2)
        for point in points
    ]
    base, token, pair = solve(features, [point.seconds for point in points])
    return PrefillCurve(base_s=base, per_token_s=token, per_pair_s=pair)


def fit_decode(points: Sequence[DecodePoint]) -> DecodeCurve:
    """a + b * sequences + c * context tokens."""
    if len(points) < LEAST_STEPS:
        raise BadProfile(f"{len(points)} decode steps are too few for {LEAST_STEPS} coefficients")
    features = [(1.0, point.sequences, point.context_tokens) for point in points]
    base, sequence, context = solve(features, [point.seconds for point in points])
    return DecodeCurve(base_s=base, per_sequence_s=sequence, per_context_token_s=context)


def solve(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients, none negative, of least relative error."""
    costs: Floats = np.asarray(seconds, dtype=np.float64)
    if (costs <= 0).any():
        raise BadProfile("a step of a profile takes no time")
    rows: Floats = np.asarray(features, dtype=np.float64) / costs[:, None]
    scales: Floats = np.abs(rows).max(axis=0)
    scales[scales == 0] = 1.0
    rows = rows / scales
    kept = list(range(rows.shape[1]))
    found = np.zeros(rows.shape[1])
    while kept:
        part = np.linalg.lstsq(rows[:, kept], np.ones(len(costs)), rcond=None)[0]
        if (part >= 0).all():
            found[kept] = part
            break
        kept.pop(int(part.argmin()))
    return tuple(float(value) for value in found / scales)
