"""Arrival times from a rate that may change, and how irregular they are.

Arrivals of mean gap 1 are drawn first and mapped through the inverse of the rate's integral, so the
gaps keep their coefficient of variation (CV) whatever the rate does.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Protocol

import numpy as np

_TABLE = 4096


class Rate(Protocol):
    """Requests per second, from time 0 on, and their integral."""

    def at(self, t_s: float) -> float:
        """Requests per second."""
        ...

    def total(self, t_s: float) -> float:
        """Requests expected until `t_s`."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """The same rate for ever."""

    rps: float

    def at(self, t_s: float) -> float:
        return self.rps

    def total(self, t_s: float) -> float:
        return self.rps * t_s


@dataclass(frozen=True, slots=True)
class Ramp:
    """From one rate to another in `duration_s`, then at that."""

    from_rps: float
    to_rps: float
    duration_s: float

    def at(self, t_s: float) -> float:
        share = min(1.0, t_s / self.duration_s)
        return self.from_rps + (self.to_rps - self.from_rps) * share

    def total(self, t_s: float) -> float:
        ramped_s = min(t_s, self.duration_s)
        return ramped_s * (self.from_rps + self.at(ramped_s)) / 2 + self.to_rps * (t_s - ramped_s)


@dataclass(frozen=True, slots=True)
class Sine:
    """Around a mean, with an amplitude of at most that, and a period."""

    mean_rps: float
    amplitude_rps: float
    period_s: float

    def at(self, t_s: float) -> float:
        return self.mean_rps + self.amplitude_rps * math.sin(2 * math.pi * t_s / self.period_s)

    def total(self, t_s: float) -> float:
        turn = 2 * math.pi / self.period_s
        return self.mean_rps * t_s + self.amplitude_rps * (1 - math.cos(turn * t_s)) / turn


@dataclass(frozen=True, slots=True)
class Step:
    """One rate, and from `at_s` on another."""

    before_rps: float
    after_rps: float
    at_s: float

    def at(self, t_s: float) -> float:
        return self.before_rps if t_s < self.at_s else self.after_rps

    def total(self, t_s: float) -> float:
        early_s = min(t_s, self.at_s)
        return self.before_rps * early_s + self.after_rps * (t_s - early_s)


def draw_arrivals(rate: Rate, count: int, random: Random, *, cv: float = 1.0) -> list[float]:
    """Seconds from 0 of `count` arrivals; gaps are Gamma of CV `cv`: 1 is Poisson, 0 is regular."""
    work, units = 0.0, list[float]()
    for _ in range(count):
        work += 1.0 if cv == 0 else random.gammavariate(1 / cv**2, cv**2)
        units.append(work)
    if isinstance(rate, Constant):
        return [unit / rate.rps for unit in units]
    end_s = 1.0
    while rate.total(end_s) < work:
        end_s *= 2
    times_s = np.linspace(0.0, end_s, _TABLE)
    totals = [rate.total(t_s) for t_s in times_s]
    return [float(t_s) for t_s in np.interp(units, totals, times_s)]
