"""Part `latency`: what the router adds to the time to first token, beside long prompts too."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.router.latency import LONG_TOKENS, RATE_PER_S, Ttft, direct, routed
from benchmarks.router.rig import Rig, hosted
from benchmarks.types import Finding, Part, ResultTable, Run, at_most

if TYPE_CHECKING:
    from matplotlib.axes import Axes

P50_TARGET_MS, P99_TARGET_MS = 2.0, 10.0
LONG_MOVES_TARGET_MS = 20.0
ROUNDS = 3
_WARM_S = 0.5


@dataclass(frozen=True, slots=True)
class Measured:
    """By round: the worker itself, through the router, the same beside long prompts."""

    direct: list[Ttft] = field(default_factory=list)
    routed: list[Ttft] = field(default_factory=list)
    beside_long: list[Ttft] = field(default_factory=list)


def run(run: Run) -> Finding:
    """The three take turns, each round at other random times."""
    return _finding(hosted(run).run(lambda rig: _measure(run, rig)))


async def _measure(run: Run, rig: Rig) -> Measured:
    seconds, measured = 1.2 if run.quick else 6.0, Measured()
    await routed(rig, 0, _WARM_S)
    for seed in range(1, ROUNDS + 1):
        run.progress("open loops", seed - 1, ROUNDS)
        measured.direct.append(await direct(rig, seed, seconds))
        measured.routed.append(await routed(rig, seed, seconds))
        measured.beside_long.append(await routed(rig, seed, seconds, long_prompts=True))
    return measured


def _finding(measured: Measured) -> Finding:
    added_p50 = _moved(measured.routed, measured.direct, lambda ttft: ttft.p50)
    added_p99 = _moved(measured.routed, measured.direct, lambda ttft: ttft.p99)
    long_ms = _moved(measured.beside_long, measured.routed, lambda ttft: ttft.p99)
    return Finding(
        tables=(_table(measured),),
        targets=(
            at_most("added time to first token, p50", added_p50, P50_TARGET_MS, "ms"),
            at_most("added time to first token, p99", added_p99, P99_TARGET_MS, "ms"),
            at_most(
                f"a prompt of {LONG_TOKENS} tokens moves the others' p99",
                long_ms,
                LONG_MOVES_TARGET_MS,
                "ms",
            ),
        ),
        keys={
            "added_ttft_ms_p50": round(added_p50, 3),
            "added_ttft_ms_p99": round(added_p99, 3),
            "long_prompt_moves_p99_ms": round(long_ms, 3),
        },
        draw=lambda axes: _draw(axes, measured),
    )


def _moved(these: Sequence[Ttft], those: Sequence[Ttft], number: Callable[[Ttft], float]) -> float:
    """Median over the rounds of the difference within a round."""
    return statistics.median(number(a) - number(b) for a, b in zip(these, those, strict=True))


def _ways(measured: Measured) -> tuple[tuple[str, str, list[Ttft]], ...]:
    return (
        ("direct", "worker reached directly", measured.direct),
        ("routed", "through the router", measured.routed),
        ("long", f"the same beside prompts of {LONG_TOKENS} tokens", measured.beside_long),
    )


def _table(measured: Measured) -> ResultTable:
    return ResultTable(
        title=f"time to first token, open loop, {RATE_PER_S:g} requests/s: medians of {ROUNDS}",
        columns=("way", "p50 ms", "p99 ms"),
        texts=1,
        rows=tuple(
            (
                title,
                f"{statistics.median(ttft.p50 for ttft in ttfts):.2f}",
                f"{statistics.median(ttft.p99 for ttft in ttfts):.2f}",
            )
            for _, title, ttfts in _ways(measured)
        ),
    )


def _draw(axes: Axes, measured: Measured) -> None:
    ways = _ways(measured)
    places = range(len(ways))
    p50s = [statistics.median(ttft.p50 for ttft in ttfts) for _, _, ttfts in ways]
    p99s = [statistics.median(ttft.p99 for ttft in ttfts) for _, _, ttfts in ways]
    axes.bar([place - 0.2 for place in places], p50s, 0.4)
    axes.bar([place + 0.2 for place in places], p99s, 0.4)
    axes.set_xticks(list(places), [short for short, _, _ in ways])
    axes.legend(["p50", "p99"])
    axes.set(ylabel="ms", title="time to first token")


PART = Part(
    name="latency",
    what="added time to first token, alone and beside prompts of 60,000 tokens",
    keys=("added_ttft_ms_p50", "added_ttft_ms_p99", "long_prompt_moves_p99_ms"),
    run=run,
)
