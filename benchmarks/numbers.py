"""Samples and their summary. Comparisons interleave, so that what changes on the machine during a
run changes all sides of it.
"""

import statistics
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from random import Random

from core.estimate import percentile

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
