"""Curves of attainment over load, for systems whose goodput a search has found.

A search ends a run that has missed its share, so its points do not say how far a system falls.
Here each system runs at fixed multiples of its own goodput, on the seeds of the search, to the end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from statistics import fmean

from core.estimate import Estimate
from simulator.build import Settings
from simulator.goodput import Found, Point, Question, Standing, System, run_once, settings_of
from simulator.processes import run_all

LOADS = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Times the mean goodput of a system."""


@dataclass(frozen=True, slots=True)
class Level:
    """One load of a system. `scale` and `rate_per_gpu_s` are means of the seeds."""

    scale: float
    rate_per_gpu_s: float
    attainment: Estimate
    per_seed: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AttainmentCurve:
    """Levels in the order of their loads; none where all requests of a trace come at once."""

    system: str
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    system: System
    seed: int
    load: int
    """Its place in LOADS."""
    scale: float


def attainment_curves(
    systems: Sequence[System],
    settings: Settings,
    question: Question,
    standings: Sequence[Standing],
    *,
    processes: int = 1,
    on_run: Callable[[], None] = lambda: None,
) -> list[AttainmentCurve]:
    """One for each standing, in their order. `on_run` hears of each run as it ends."""
    by_name = {system.name: system for system in systems}
    closed = settings.simulation.closed_sessions
    runs = [
        _Run(system=by_name[standing.system], seed=found.seed, load=i, scale=scale)
        for standing in standings
        for i, load in enumerate(LOADS)
        for found, scale in _scales(standing, standings[0], load, question, closed=closed)
    ]
    tasks = [(settings, question, run) for run in runs]
    ended = starmap(_attain, tasks) if processes == 1 else run_all(_attain, tasks, processes)
    points: dict[tuple[str, int], dict[int, Point]] = {}
    for run, point in ended:
        points.setdefault((run.system.name, run.load), {})[run.seed] = point
        on_run()
    return [
        AttainmentCurve(
            standing.system,
            tuple(
                _level([of_seed for _, of_seed in sorted(points[standing.system, i].items())])
                for i in range(len(LOADS))
                if (standing.system, i) in points
            ),
        )
        for standing in standings
    ]


def _attain(settings: Settings, question: Question, run: _Run) -> tuple[_Run, Point]:
    """A share of 0 is never missed, so the run is not ended early."""
    mine, whole = settings_of(run.system, settings), replace(question, share=0.0)
    return run, run_once(mine, whole, run.seed, run.scale)


def _level(points: Sequence[Point]) -> Level:
    shares = tuple(point.attainment for point in points)
    return Level(
        fmean(point.scale for point in points),
        fmean(point.rate_per_gpu_s for point in points),
        Estimate.of(shares),
        shares,
    )


def _scales(
    standing: Standing, best: Standing, load: float, question: Question, *, closed: bool
) -> list[tuple[Found, float]]:
    """What each seed is scaled by, so that all of them have the same load: the same requests/s, or
    as many sessions at once. A system without any goodput is shown at the best one's loads.
    """
    own = standing if standing.goodput.mean > 0 else best
    if closed:
        kept = fmean(kept_scale(found, question.share) for found in own.found)
        sessions = max(1.0, round(load * (kept or question.first_scale)))
        return [(found, sessions) for found in standing.found]
    scales = list[tuple[Found, float]]()
    for found in standing.found:
        rates = [point for point in found.points if point.rate_per_gpu_s > 0]
        if rates:
            rate = load * (own.goodput.mean or rates[0].rate_per_gpu_s)
            near = min(rates, key=lambda point: abs(point.rate_per_gpu_s - rate))
            scales.append((found, near.scale * rate / near.rate_per_gpu_s))
    return scales


def kept_scale(found: Found, share: float) -> float:
    """The highest that kept the share, 0 if none did."""
    return max((point.scale for point in found.points if point.attainment >= share), default=0.0)
