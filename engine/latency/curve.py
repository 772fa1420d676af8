"""Measured points with straight lines between them, and sums along them without a loop."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil
from typing import Self


@dataclass(frozen=True, slots=True)
class Curve:
    """y over x. Below the first point it is flat; beyond the last it goes on as it came, but never
    falls. One point is a constant. Raises ValueError unless x increases.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.xs or len(self.xs) != len(self.ys):
            raise ValueError(f"{len(self.xs)} x and {len(self.ys)} y make no curve")
        if any(a >= b for a, b in pairwise(self.xs)):
            raise ValueError("the points of a curve must be in increasing order of x")

    @classmethod
    def of(cls, points: Mapping[float, float] | Mapping[int, float]) -> Self:
        """Through points given as {x: y}, in any order."""
        ordered = sorted(points.items())
        return cls(tuple(x for x, _ in ordered), tuple(y for _, y in ordered))

    def at(self, x: float) -> float:
        """y at x."""
        xs, ys = self.xs, self.ys
        i = bisect_right(xs, x)
        if i == 0:
            return ys[0]
        if i == len(xs):
            return ys[-1] + self._slope_beyond() * (x - xs[-1])
        x0, y0 = xs[i - 1], ys[i - 1]
        return y0 + (ys[i] - y0) * (x - x0) / (xs[i] - x0)

    def run(self, x: float, count: int) -> float:
        """Sum of y at x, x + 1, ..., x + count - 1: a step per segment crossed, not per x."""
        total, done = 0.0, 0
        while done < count:
            first = x + done
            i = bisect_right(self.xs, first)
            if i == len(self.xs):
                here = count - done
            else:
                here = min(count - done, max(1, ceil(self.xs[i] - first)))
            total += here * (self.at(first) + self.at(first + here - 1)) / 2
            done += here
        return total

    def _slope_beyond(self) -> float:
        if len(self.xs) == 1:
            return 0.0
        return max(0.0, (self.ys[-1] - self.ys[-2]) / (self.xs[-1] - self.xs[-2]))


@dataclass(frozen=True, slots=True)
class Grid:
    """z over x and y: a curve over y at each x, with straight lines from curve to curve.

    Below the first x it is as there; beyond the last it goes on as it came. Raises ValueError
    unless x increases.
    """

    xs: tuple[float, ...]
    curves: tuple[Curve, ...]

    def __post_init__(self) -> None:
        Curve(self.xs, tuple(0.0 for _ in self.curves))

    @classmethod
    def of(cls, points: Mapping[tuple[int, int], float]) -> Self:
        """Through points given as {(x, y): z}, in any order; each x may have its own y."""
        rows: dict[int, dict[int, float]] = {}
        for (x, y), z in points.items():
            rows.setdefault(x, {})[y] = z
        ordered = sorted(rows.items())
        return cls(tuple(float(x) for x, _ in ordered), tuple(Curve.of(row) for _, row in ordered))

    def at(self, x: float, y: float) -> float:
        """z at x and y."""
        return self._mix(x, [curve.at(y) for curve in self._around(x)])

    def run(self, x: float, y: float, count: int) -> float:
        """Sum of z at (x, y), (x, y + 1), ..., (x, y + count - 1)."""
        return count * self._mix(x, [curve.run(y, count) / count for curve in self._around(x)])

    def _around(self, x: float) -> Sequence[Curve]:
        """The two curves on either side of x, or the one or two nearest."""
        i = bisect_right(self.xs, x)
        if i == 0:
            return self.curves[:1]
        return self.curves[max(0, min(i, len(self.xs) - 1) - 1) :][:2]

    def _mix(self, x: float, values: Sequence[float]) -> float:
        if len(values) == 1:
            return values[0]
        i = min(max(bisect_right(self.xs, x), 1), len(self.xs) - 1)
        x0, x1 = self.xs[i - 1], self.xs[i]
        return values[0] + (values[1] - values[0]) * (x - x0) / (x1 - x0)
