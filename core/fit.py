"""Costs learned from what was measured: small least squares that forget, for decisions that need a
time before they spend it.

    cost = sum_i coefficient_i * feature_i        coefficients and features are never below 0

A prior gives each coefficient a first value p_i. With s = sum_i p_i * feature_i, what the prior
says of an observation, all is measured in units of the prior: the ratio u = cost / s, and shares
q_i = p_i * feature_i / s, which sum to 1. The fit is the c >= 0 that minimises

    sum_k  m^age(k) * (u_k - sum_i c_i * q_ki)^2  +  w * sum_i (c_i - level)^2

where m is a little below 1, `level` is the weighted mean of u, and coefficient_i = c_i * p_i. So
observations of all sizes count alike. The prior's level is forgotten as an observation is; its
shape, how a cost splits into its parts, stays worth `w` observations and decides what they leave
open: few of them, or many of one size. One far above what was expected, a stall, counts only up to
a clip; several in a row are the new truth.
"""

from collections.abc import Sequence
from operator import mul

_SHAPE_WEIGHT = 0.1  # tells parts apart to a tenth when the prior's shape is off tenfold
_CLIP_AFTER = 8
_CLIP = 4.0
_CLIPPED_IN_ROW = 3
_SWEEPS = 12
_SETTLED = 1e-6


class CostFit:
    """Least squares as above; `prior` holds one positive value per feature.

    `weight` is that of the prior's level, in observations. About the last `memory` observations
    count: each is worth 1 - 1/memory of the one after it.
    """

    def __init__(
        self, prior: Sequence[float], *, weight: float = 1.0, memory: float = 64.0
    ) -> None:
        if not prior or min(prior) <= 0 or weight <= 0 or memory <= 1:
            raise ValueError(f"not a prior, a weight and a memory: {prior}, {weight}, {memory}")
        self._prior = tuple(prior)
        self._keep = 1.0 - 1.0 / memory
        self._weight = weight
        self._ratios = weight
        self._moments = [[0.0] * len(prior) for _ in prior]
        self._products = [0.0] * len(prior)
        self._scales = [1.0] * len(prior)
        self._high = 0
        self.observed = 0
        """Observations so far."""

    @property
    def coefficients(self) -> tuple[float, ...]:
        """Cost per unit of each feature."""
        return tuple(c * p for c, p in zip(self._scales, self._prior, strict=True))

    def add(self, features: Sequence[float], cost: float) -> None:
        """One observation. Without a positive feature, or with a negative cost, it is void."""
        shares, expected = self._shares(features)
        if expected <= 0 or cost < 0:
            return
        ratio = cost / expected
        ratio = self._clip(ratio, self._ratio(shares))
        self.observed += 1
        self._weight = self._keep * self._weight + 1.0
        self._ratios = self._keep * self._ratios + ratio
        keep, products = self._keep, self._products
        for i, (share, row) in enumerate(zip(shares, self._moments, strict=True)):
            products[i] = keep * products[i] + share * ratio
            row[:] = [
                keep * moment + share * other for moment, other in zip(row, shares, strict=True)
            ]
        self._solve()

    def predict(self, features: Sequence[float]) -> float:
        """The expected cost: at least 0, and never less for more of a feature."""
        shares, expected = self._shares(features)
        return self._ratio(shares) * expected

    def _clip(self, ratio: float, expected: float) -> float:
        """What a ratio counts as, where `expected` was."""
        if self.observed < _CLIP_AFTER or ratio <= _CLIP * expected:
            self._high = 0
            return ratio
        self._high += 1
        return ratio if self._high > _CLIPPED_IN_ROW else _CLIP * expected

    def _shares(self, features: Sequence[float]) -> tuple[list[float], float]:
        parts = [p * max(0.0, x) for p, x in zip(self._prior, features, strict=True)]
        total = sum(parts)
        return ([part / total for part in parts] if total > 0 else parts), total

    def _ratio(self, shares: Sequence[float]) -> float:
        ratio: float = sum(map(mul, self._scales, shares))
        return ratio

    def _solve(self) -> None:
        """Coordinate descent from the last solution, each coordinate exact and cut off at 0.

        The problem is convex, and its condition number at most memory / w: a few sweeps do.
        """
        level, scales = self._ratios / self._weight, self._scales
        rows = [
            (i, row, row[i], row[i] + _SHAPE_WEIGHT, product + _SHAPE_WEIGHT * level)
            for i, (row, product) in enumerate(zip(self._moments, self._products, strict=True))
        ]
        settled = _SETTLED * level
        for _ in range(_SWEEPS):
            has_moved = False
            for i, row, own, divisor, target in rows:
                before = scales[i]
                wanted = target - sum(map(mul, row, scales)) + own * before
                scale = wanted / divisor if wanted > 0.0 else 0.0
                scales[i] = scale
                if not -settled <= scale - before <= settled:
                    has_moved = True
            if not has_moved:
                return


class LinearFit:
    """cost = base + slope * x, learned online; the arguments are the prior, see CostFit."""

    def __init__(
        self, base: float, slope: float, *, weight: float = 1.0, memory: float = 64.0
    ) -> None:
        self._fit = CostFit((base, slope), weight=weight, memory=memory)

    @property
    def observed(self) -> int:
        """Observations so far."""
        return self._fit.observed

    @property
    def coefficients(self) -> tuple[float, float]:
        """Base and slope now."""
        base, slope = self._fit.coefficients
        return base, slope

    def add(self, x: float, cost: float) -> None:
        """One observation; x >= 0."""
        self._fit.add((1.0, x), cost)

    def predict(self, x: float) -> float:
        """The expected cost of `x`: at least 0, never falling."""
        return self._fit.predict((1.0, x))


class PrefillCost:
    """What prefill takes on one worker.

        seconds of a step = a + b * tokens + c * pairs

    `pairs` counts the (token, itself or an earlier one) pairs that attention looks at. From chunks
    of one size the curve a + b*n + c*n^2 cannot be told; pairs grow with the position and can. The
    two terms are those of Mooncake's flops(n) = l * (4*n^2*d + 22*n*d^2) (FAST'25). The prior
    is Llama-3-8B on an H100; of it only the shape outlives the first steps.
    """

    _PRIOR = (3.91e-3, 1.424e-5, 1.5e-9)

    def __init__(self, step_tokens: int) -> None:
        self._step_tokens = step_tokens
        self._fit = CostFit(self._PRIOR, weight=0.1)

    @property
    def observed_steps(self) -> int:
        """Steps so far; before the first few a prediction is a guess."""
        return self._fit.observed

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """Seconds per step, per token, per pair."""
        a, b, c = self._fit.coefficients
        return a, b, c

    def add(self, chunks: Sequence[tuple[int, int]], seconds: float) -> None:
        """One step that fed positions [start, end) of each chunk, and nothing else."""
        tokens = sum(end - start for start, end in chunks)
        if tokens > 0:
            pairs = sum(pairs_of(start, end) for start, end in chunks)
            self._fit.add((1.0, tokens, pairs), seconds)

    def predict_s(self, start: int, end: int) -> float:
        """Seconds to compute positions [start, end) alone, in as few steps as the budget allows."""
        if end <= start:
            return 0.0
        steps = -(-(end - start) // self._step_tokens)
        return self._fit.predict((steps, end - start, pairs_of(start, end)))


def pairs_of(start: int, end: int) -> float:
    """Of positions [start, end): the token at position i looks at i + 1 positions."""
    return (end - start) * (start + end + 1) / 2
