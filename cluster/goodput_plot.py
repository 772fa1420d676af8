"""The plot of `baton goodput`: attainment over load, a curve for each system."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING

from simulator.attainment import AttainmentCurve, Level
from simulator.goodput import Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP"


def draw_attainment(
    axes: Axes,
    curves: Sequence[AttainmentCurve],
    standings: Sequence[Standing],
    share: float,
    *,
    closed: bool,
) -> None:
    """Means of the seeds with their 95 % interval, and the share. Of closed sessions the load is
    their number: a slow system is asked less, so its requests/s say little.
    """
    for i, (curve, standing) in enumerate(zip(curves, standings, strict=True)):
        loads = [level.scale if closed else level.rate_per_gpu_s for level in curve.levels]
        (line,) = axes.plot(
            loads,
            [level.attainment.mean for level in curve.levels],
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=4,
            linewidth=1.5,
            label=_label(standing),
        )
        low, high = _bounds(curve.levels)
        axes.fill_between(loads, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axhline(share, color="gray", linestyle=":", linewidth=1, label=f"{share:.0%} asked for")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("sessions open at once" if closed else "requests/s per GPU")
    axes.set_ylabel("share within both targets")
    axes.set_title("mean of the seeds, band: 95 % interval", fontsize=9)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),  # below: curves may be anywhere within
        ncols=2,
        fontsize=8,
        title="goodput, requests/s per GPU",
        title_fontsize=8,
    )


def _label(standing: Standing) -> str:
    half = standing.goodput.half
    at_least = ">= " if standing.at_least else ""
    interval = f" +- {half:.2g}" if isfinite(half) else ""
    return f"{standing.system}: {at_least}{standing.goodput.mean:.3g}{interval}"


def _bounds(levels: Sequence[Level]) -> tuple[list[float], list[float]]:
    """Of the intervals, within 0 and 1; one seed has none."""
    halves = [h if isfinite(h) else 0.0 for h in (level.attainment.half for level in levels)]
    means = [level.attainment.mean for level in levels]
    return (
        [max(0.0, mean - half) for mean, half in zip(means, halves, strict=True)],
        [min(1.0, mean + half) for mean, half in zip(means, halves, strict=True)],
    )
