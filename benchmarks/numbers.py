"""Samples and their summary. Comparisons interleave, so that what changes on the machine during a
run changes all sides of it.
"""

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

_ORDER_SEED = 0


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of repeated measurements of one thing."""

    seconds: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p90_s(self) -> float:
        return percentile(self.seconds, 0.9)

    def gb_per_s(self, nbytes: int) -> float:
        """10^9 bytes per second at the median."""
        return nbytes / self.median_s / 1e9

    def spread(self) -> str:
        """Least and greatest, in ms."""
        return f"{min(self.seconds) * 1e3:.2f}..{max(self.seconds) * 1e3:.2f}"


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

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """From 2 to 10 independent values; one alone has an endless interval."""
        mean, count = statistics.fmean(values), len(values)
        if count < 2:
            return Estimate(mean, float("inf"))
        half = _T_95[min(count, 10) - 2] * statistics.stdev(values) / count**0.5
        return Estimate(mean, half)


async def interleave(
    rounds: int,
    ways: Mapping[str, Callable[[], Awaitable[float]]],
    *,
    warm_up: int = 1,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Samples]:
    """Measure each way once per round; answers seconds by way, without the warm-up.

    Each round has an order of its own, as what ran before decides what is in the caches: rotated,
    one way would always follow the same other one. The warm-up keeps the order given.
    """
    names = list(ways)
    orders = Random(_ORDER_SEED)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(warm_up + rounds):
        if i >= warm_up:
            orders.shuffle(names)
        for name in names:
            taken_s = await ways[name]()
            if i >= warm_up:
                seconds[name].append(taken_s)
        on_round(i + 1)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}
