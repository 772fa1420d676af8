"""`baton goodput`: the highest rate that several systems serve, as a table, a plot and JSON.

Everything shown is simulated, and says so.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from math import isfinite
from pathlib import Path
from statistics import fmean

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.goodput_plot import draw_attainment
from cluster.long_work import bar, given_up
from cluster.plot import draw_plot
from cluster.simulate import settings_of
from cluster.tables import new_table, print_table
from core.errors import InvalidRequest
from simulator.attainment import LOADS, AttainmentCurve, Level, attainment_curves, kept_scale
from simulator.build import Settings, build_spec, describe_kv, describe_workers
from simulator.goodput import LEAST_TARGETS, Question, Standing, System, choose_systems, compare
from simulator.workload.build import Shaping, check_rate
from simulator.workload.load import load_workload

_STAYS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for."""

    question: Question
    systems: tuple[str, ...] = ()
    seeds: int = 5
    processes: int = 0
    """0: one per core."""
    only_json: bool = False
    plot: Path | None = None


def run_goodput(config: ClusterConfig, options: Options) -> None:
    """Search, show, and end with one JSON object."""
    if not 1 <= options.seeds <= 10:
        raise InvalidRequest("from 1 to 10 seeds; fewer than 2 have no interval")
    systems = choose_systems(options.systems)
    settings = settings_of(config)
    question = options.question
    # A bad trace is said here, once.
    shaping = Shaping(requests=question.requests, max_prompt_tokens=question.max_prompt_tokens)
    asked = load_workload(question.trace, shaping).workload.requests
    if not settings.simulation.closed_sessions:
        check_rate(question.trace, asked)
    standings, curves = _simulate(systems, settings, options)
    outputs = fmean(request.output_tokens for request in asked)
    notes = [
        *_short_windows(standings, question, settings, outputs),
        *_bounds(standings),
        *describe_kv(settings, asked),
    ]
    if not options.only_json:
        _show(Console(), standings, question, settings, notes)
    if options.plot is not None:
        _draw(options.plot, curves, standings, question, settings)
    print(json.dumps(_as_json(standings, curves, options, settings, notes)), flush=True)


def _simulate(
    systems: Sequence[System], settings: Settings, options: Options
) -> tuple[list[Standing], list[AttainmentCurve]]:
    """The search, and where a plot is wanted its curves: these are as much work again."""
    searches = len(systems) * options.seeds
    runs = searches * len(LOADS) if options.plot is not None else 0
    processes = options.processes or os.cpu_count() or 1
    with (
        given_up("the search was given up, no rate is known"),
        bar("searching, simulated", searches + runs) as report,
    ):
        done = count(1)
        standings = compare(
            systems,
            settings,
            options.question,
            range(options.seeds),
            processes=processes,
            on_found=lambda found: report(next(done)),
        )
        if not runs:
            return standings, []
        curves = attainment_curves(
            systems,
            settings,
            options.question,
            standings,
            processes=processes,
            on_run=lambda: report(next(done)),
        )
        return standings, curves


def _draw(
    path: Path,
    curves: Sequence[AttainmentCurve],
    standings: Sequence[Standing],
    question: Question,
    settings: Settings,
) -> None:
    closed = settings.simulation.closed_sessions
    panel = {
        "attainment": lambda axes: draw_attainment(
            axes, curves, standings, question.share, closed=closed
        )
    }
    print(draw_plot(path, f"simulated: {Path(question.trace).name}", panel), file=sys.stderr)


# -- what must be known beside the numbers ------------------------------------------------------


def _short_windows(
    standings: Sequence[Standing], question: Question, settings: Settings, outputs: float
) -> Iterator[str]:
    """Systems whose runs offer a burst and not a rate; closed sessions have no windows."""
    stay_s = settings.slo.ttft_s + settings.slo.tpot_s * outputs
    least_s = max(_STAYS * stay_s, LEAST_TARGETS * settings.slo.ttft_s)
    rates = {s.system: s.goodput.mean * build_spec(settings, 1, 0).gpus for s in standings}
    short = [
        f"{system} {question.requests / rate:.3g} s"
        for system, rate in rates.items()
        if rate > 0 and question.requests / rate < least_s
    ]
    if short and not settings.simulation.closed_sessions:
        yield (
            f"a request that just keeps its targets stays {stay_s:.3g} s, its first token comes in"
            f" {settings.slo.ttft_s:.3g} s, and a run lasts: {', '.join(short)}. That is a burst"
            f" and not a rate, which is served too well; ask for {_STAYS} stays and"
            f" {LEAST_TARGETS} TTFT targets at least:"
            f" --requests {int(least_s * max(rates.values())) + 1}"
        )


def _bounds(standings: Sequence[Standing]) -> Iterator[str]:
    bounds = [standing.system for standing in standings if standing.at_least]
    if bounds:
        yield (
            f"the search ended before a rate was too high for {', '.join(bounds)}: at least (>=)"
            " what is shown, so what is behind is not known; begin higher, with --rate-scale"
        )


# -- showing ------------------------------------------------------------------------------------


def _show(
    console: Console,
    standings: Sequence[Standing],
    question: Question,
    settings: Settings,
    notes: Sequence[str],
) -> None:
    table = new_table(
        ("simulated system",),
        ("requests/s per GPU", "+-", "behind best", "+-"),
        title=f"highest rate at which {question.share:.0%} keep both targets, simulated",
    )
    for standing in standings:
        table.add_row(
            standing.system + (" =" if _tied(standing) else ""),
            (">= " if standing.at_least else "") + f"{standing.goodput.mean:.4g}",
            _half(standing.goodput.half),
            f"{standing.behind.mean:.4g}",
            _half(standing.behind.half),
        )
    print_table(console, table)
    slo = settings.slo
    lines = [
        f"{build_spec(settings, 1, 0).gpus} GPUs; targets {slo.ttft_s:g} s and"
        f" {slo.tpot_s * 1e3:g} ms; {describe_workers(settings)}",
        "= the difference to the best lies within its 95 % interval",
    ]
    for line in (*lines, *notes):
        console.print(f"[dim]{line}[/]", highlight=False, soft_wrap=True)


def _half(half: float) -> str:
    return f"{half:.2g}" if isfinite(half) else "-"


def _tied(standing: Standing) -> bool | None:
    """None where one seed tells no interval."""
    return standing.is_tied if isfinite(standing.behind.half) else None


def _as_json(
    standings: Sequence[Standing],
    curves: Sequence[AttainmentCurve],
    options: Options,
    settings: Settings,
    notes: Sequence[str],
) -> dict[str, object]:
    share = options.question.share
    levels = {curve.system: [_level_json(level) for level in curve.levels] for curve in curves}
    load = "sessions_per_seed" if settings.simulation.closed_sessions else "scale_per_seed"
    return {
        "simulated": True,
        "trace": Path(options.question.trace).name,
        "requests": options.question.requests,
        "seeds": options.seeds,
        "gpus": build_spec(settings, 1, 0).gpus,
        "workers": describe_workers(settings),
        "slo": asdict(settings.slo),
        "share": share,
        "goodput": {
            standing.system: {
                "requests_per_gpu_s": standing.goodput.mean,
                "half_width": _finite(standing.goodput.half),
                "at_least": standing.at_least,
                "behind_best": standing.behind.mean,
                "behind_half_width": _finite(standing.behind.half),
                "tied": _tied(standing),
                "per_seed": [found.rate_per_gpu_s for found in standing.found],
                load: [kept_scale(found, share) for found in standing.found],
                "attainment": levels.get(standing.system, []),
            }
            for standing in standings
        },
        "notes": list(notes),
    }


def _level_json(level: Level) -> dict[str, object]:
    return {
        "scale": level.scale,
        "requests_per_gpu_s": level.rate_per_gpu_s,
        "share": level.attainment.mean,
        "half_width": _finite(level.attainment.half),
        "per_seed": list(level.per_seed),
    }


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
