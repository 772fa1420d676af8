"""Curves of attainment over load, on the queues of the search."""

from dataclasses import replace

import pytest

from router.policies.base import Slo
from simulator.attainment import LOADS, attainment_curves, kept_scale
from simulator.config import SimulationConfig
from simulator.goodput import SYSTEMS, Found, Point, compare, rank
from tests.simulator.test_goodput import BATON, COLOCATED, QUESTION, SETTINGS

SMALL = replace(QUESTION, requests=120, refine=2)


def test_each_system_has_a_level_at_each_multiple_of_its_goodput_beyond_the_knee_too() -> None:
    standings = compare([BATON, COLOCATED], SETTINGS, SMALL, range(2))
    runs: list[None] = []
    curves = attainment_curves(
        [BATON, COLOCATED], SETTINGS, SMALL, standings, on_run=lambda: runs.append(None)
    )
    assert len(runs) == 2 * 2 * len(LOADS)
    assert [curve.system for curve in curves] == [standing.system for standing in standings]
    for curve, standing in zip(curves, standings, strict=True):
        rates = [level.rate_per_gpu_s for level in curve.levels]
        assert rates == pytest.approx([load * standing.goodput.mean for load in LOADS])
        shares = [level.attainment.mean for level in curve.levels]
        assert shares[0] > SMALL.share > shares[-1]
        assert all(len(level.per_seed) == 2 for level in curve.levels)


def test_a_run_beyond_the_share_is_not_ended_early() -> None:
    """One that were would say the share that it had missed, and no less."""
    hopeless = replace(SETTINGS, slo=Slo(ttft_s=0.01, tpot_s=0.1))
    found = Found("baton", 0, 0.0, (Point(1.0, 0.5, 0.899),))
    (curve,) = attainment_curves([BATON], hopeless, SMALL, rank([found]))
    assert [level.attainment.mean for level in curve.levels] == [0.0] * len(LOADS)


def test_a_system_without_goodput_is_shown_at_the_best_ones_loads() -> None:
    best = Found("baton", 0, 0.5, (Point(1.0, 0.5, 0.95),))
    none = Found("colocated-least-load", 0, 0.0, (Point(1.0, 0.5, 0.2),))
    one, other = attainment_curves([BATON, COLOCATED], SETTINGS, SMALL, rank([best, none]))
    assert [level.rate_per_gpu_s for level in one.levels] == pytest.approx(
        [level.rate_per_gpu_s for level in other.levels]
    )


def test_all_seeds_are_asked_the_same_rate_though_their_parts_of_a_trace_differ() -> None:
    standing = rank(
        [
            Found("baton", 0, 0.4, (Point(1.0, 0.4, 0.95),)),
            Found("baton", 1, 0.6, (Point(1.0, 0.6, 0.95),)),
        ]
    )
    (curve,) = attainment_curves([BATON], SETTINGS, SMALL, standing)
    assert curve.levels[2].scale == pytest.approx((0.5 / 0.4 + 0.5 / 0.6) / 2)


def test_closed_sessions_are_counted_and_not_scaled_to_a_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = replace(SETTINGS, simulation=SimulationConfig(closed_sessions=True))
    monkeypatch.setattr(
        "simulator.attainment.run_once",
        lambda settings, question, seed, scale: Point(scale, 0.7, 1 / scale),
    )
    standing = rank([Found("baton", seed, 0.7, (Point(8.0, 0.7, 0.95),)) for seed in range(2)])
    (curve,) = attainment_curves([BATON], closed, SMALL, standing)
    assert [level.scale for level in curve.levels] == [4, 6, 8, 10, 12]


def test_one_process_and_two_draw_the_same_curve() -> None:
    standings = rank([Found("mooncake", seed, 0.4, (Point(1.0, 0.5, 1.0),)) for seed in range(2)])
    systems = [SYSTEMS["mooncake"]]
    one = attainment_curves(systems, SETTINGS, SMALL, standings)
    assert attainment_curves(systems, SETTINGS, SMALL, standings, processes=2) == one


def test_the_scale_kept_is_the_highest_within_the_share() -> None:
    found = Found("a", 0, 2.0, (Point(1, 1, 1.0), Point(2, 2, 0.92), Point(4, 4, 0.89)))
    assert kept_scale(found, 0.9) == 2
    assert kept_scale(found, 1.01) == 0
