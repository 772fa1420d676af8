"""Part `quality`: every policy on every trace given, at the rates where the best one reaches 0.99,
0.9 and 0.7 within the TTFT target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import count
from typing import TYPE_CHECKING

from benchmarks.routing.replay import World
from benchmarks.routing.study import OURS, TARGETS, Comparison, Standing, Study, verdict
from benchmarks.routing.traces import Prompt, Trace, load_trace
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COARSE_BLOCK = 256
_CACHE_TOKENS = 1_000_000
_SMALL_CACHE_TOKENS = 100_000
"""Of traces in small blocks, which hold few sessions: theirs would all fit."""
_SHOWN = 6


def run(run: Run) -> Finding:
    """Raises BenchFailed without a trace."""
    compared: list[Comparison] = []
    for path in run.traces:
        trace = load_trace(path)
        prompts_of = cache(partial(trace.prompts, 1200 if run.quick else 2500))
        for workers in (8,) if run.quick else (8, 16):
            study = _study(run, trace, prompts_of, workers)
            compared += study.compare(TARGETS[1:2] if run.quick else TARGETS)
    return Finding(
        tables=tuple(_table(comparison) for comparison in compared),
        targets=tuple(_targets(compared)),
        notes=(
            "share within a TTFT target of 5 s and half its 95 % interval over seeds; = tied with"
            " the best: the paired difference lies within its interval; load: greatest by mean",
            "workers compute first come first served, 160 us per token;"
            f" caches of {_CACHE_TOKENS:,} tokens ({_SMALL_CACHE_TOKENS:,} for traces in blocks"
            f" below {_COARSE_BLOCK}); prompts cut to 20,480 tokens",
        ),
        keys={"quality": [_json(comparison) for comparison in compared]},
        draw=lambda axes: _draw(axes, compared),
    )


def _study(
    run: Run, trace: Trace, prompts_of: Callable[[int], list[Prompt]], workers: int
) -> Study:
    steps = count(1)
    coarse = trace.block_size >= _COARSE_BLOCK

    def step() -> None:
        run.progress(f"{trace.name} on {workers} workers", next(steps), 0)

    return Study(
        trace=trace.name,
        world=World(
            workers=workers,
            block_size=trace.block_size,
            cache_tokens=_CACHE_TOKENS if coarse else _SMALL_CACHE_TOKENS,
            warm_up=300 if run.quick else 500,
        ),
        seeds=2 if run.quick else 5,
        refine=2 if run.quick else 4,
        step=step,
        prompts_of=prompts_of,
    )


def _table(comparison: Comparison) -> ResultTable:
    title = (
        f"{comparison.trace}, {comparison.workers} workers, {comparison.rate:.2f}x its rate"
        f" (best near {comparison.target:g})"
    )
    columns = ("policy", "within SLO", "+-", "behind best", "hit rate", "load")
    rows = tuple(_row(standing) for standing in comparison.standings)
    return ResultTable(title=title, columns=columns, texts=1, rows=rows)


def _row(standing: Standing) -> tuple[str, ...]:
    return (
        standing.name + (" =" if standing.tied else ""),
        f"{standing.within_slo.mean:.3f}",
        f"{standing.within_slo.half:.3f}",
        f"{standing.behind_best.mean:.3f}",
        f"{standing.hit_rate.mean:.3f}",
        f"{standing.imbalance.mean:.2f}",
    )


def _targets(compared: Sequence[Comparison]) -> list[Target]:
    promises = {
        "best or tied": f"{OURS} is best or tied within SLO",
        "hit rate": "its hit rate is at least 95 % of the best policy's",
        "balance": "its greatest load is at most 1.1 of the mean",
    }
    found: list[Target] = []
    for name, promise in promises.items():
        failed = [c for c in compared if not verdict(c)[name]]
        where = "; ".join(_failure(c, name) for c in failed)
        measured = f"{len(compared) - len(failed)} of {len(compared)} comparisons"
        found.append(
            Target(
                promise=promise,
                measured=measured + (f"; not: {where}" if where else ""),
                held=not failed,
            )
        )
    return found


def _failure(comparison: Comparison, name: str) -> str:
    ours, best = comparison.of(OURS), comparison.best
    measured = {
        "best or tied": f"{ours.within_slo.mean:.3f}, {best.name} {best.within_slo.mean:.3f}",
        "hit rate": f"{ours.hit_rate.mean:.3f}, {best.name} {best.hit_rate.mean:.3f}",
        "balance": f"{ours.imbalance.mean:.2f}",
    }[name]
    return f"{comparison.trace} on {comparison.workers} at {comparison.rate:.2f}x: {measured}"


def _json(comparison: Comparison) -> Json:
    return {
        "trace": comparison.trace,
        "workers": comparison.workers,
        "target": comparison.target,
        "rate": round(comparison.rate, 4),
        "best": comparison.best.name,
        "ours": dict(verdict(comparison)),
        "policies": {
            standing.name: {
                "within_slo": round(standing.within_slo.mean, 4),
                "within_slo_half": round(standing.within_slo.half, 4),
                "behind_best": round(standing.behind_best.mean, 4),
                "behind_best_half": round(standing.behind_best.half, 4),
                "hit_rate": round(standing.hit_rate.mean, 4),
                "imbalance": round(standing.imbalance.mean, 3),
            }
            for standing in comparison.standings
        },
    }


def _draw(axes: Axes, compared: Sequence[Comparison]) -> None:
    """Share within SLO per comparison, of the policies that are best on the whole."""
    names = [standing.name for standing in compared[0].standings]
    totals = {name: sum(c.of(name).within_slo.mean for c in compared) for name in names}
    places = range(len(compared))
    for name in sorted(totals, key=lambda n: -totals[n])[:_SHOWN]:
        shares = [c.of(name).within_slo for c in compared]
        axes.errorbar(
            places,
            [share.mean for share in shares],
            [share.half for share in shares],
            label=name,
            marker="o",
            markersize=3,
            linewidth=2 if name == OURS else 1,
        )
    axes.set_xticks(
        list(places),
        [f"{c.trace} {c.workers}w {c.rate:.1f}x" for c in compared],
        rotation=75,
        fontsize=5,
    )
    axes.set(ylabel="share within the TTFT target", title="Policies on traces")
    axes.legend(fontsize=6)


PART = Part(
    name="quality",
    what="policies on replayed traces",
    keys=("quality",),
    run=run,
    needs_trace=True,
)
