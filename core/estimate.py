"""Summaries of samples."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def percentile(values: Sequence[float], share: float) -> float:
    """The value at `share` (0 to 1) of the sorted values, interpolated between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


_T_95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95 %, of 1 to 9 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and half the width of its 95 % confidence interval."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """From 2 to 10 independent values; one alone has an endless interval."""
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return Estimate(mean, float("inf"))
        half = _T_95[min(count, 10) - 2] * statistics.stdev(values) / count**0.5
        return Estimate(mean, half)
