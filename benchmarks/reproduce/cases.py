"""What rows share: seeds, paired differences, and how they are written."""

from collections.abc import Sequence
from itertools import starmap
from operator import sub

from benchmarks.numbers import Estimate
from benchmarks.types import Json

SEEDS = 5
QUICK_SEEDS = 2


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
