"""Part `load`: what the router costs, and what it adds, under streaming load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvloop

from benchmarks.router.latency import LONG_TOKENS, RATE_PER_S, Ttft, direct, routed
from benchmarks.router.loops import Loop, measure_loop, median_loop
from benchmarks.router.rig import Rig, router_rig
from benchmarks.router.tokens import STREAMS, TokenWindow, measure_tokens
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TOKEN_TARGET_US = 20.0
REQUEST_TARGET_US = 700.0
ADDED_P50_TARGET_MS, ADDED_P99_TARGET_MS = 2.0, 10.0
LONG_MOVES_TARGET_MS = 20.0
ROUNDS = 3
REQUEST_CLIENTS, REQUEST_TOKENS = 8, 2
_CELLS = ((32, 16), (32, 128), (256, 16), (256, 128))
"""Clients and tokens per answer of the closed loops."""
_STALL_CLIENTS, _STALL_TOKENS, _STALL_STEP_S = 4, 16, 0.005
HEADLINE_CELL = (32, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All of one run. Latencies in rounds: direct, routed, routed beside long prompts."""

    windows: list[TokenWindow]
    request: Loop
    cells: list[Loop]
    stall: Loop
    direct: list[Ttft]
    routed: list[Ttft]
    beside_long: list[Ttft]


def run(run: Run) -> Finding:
    """One router process for all of it, as a cluster's serves all traffic."""
    return _finding(uvloop.run(_measure(run)))


async def _measure(run: Run) -> Measured:
    seconds = 1.0 if run.quick else 3.0
    cells = _CELLS[:2] if run.quick else _CELLS
    run.progress("starting the router", 0, 5)
    async with router_rig() as rig:
        run.progress(f"{STREAMS} streams", 1, 5)
        windows = await measure_tokens(rig, ROUNDS, seconds)
        run.progress("requests", 2, 5)
        requests = [
            await measure_loop(
                rig, clients=REQUEST_CLIENTS, answer_tokens=REQUEST_TOKENS, seconds=seconds
            )
            for _ in range(ROUNDS)
        ]
        run.progress("closed loops", 3, 5)
        measured = [await _cell(rig, clients, tokens, seconds) for clients, tokens in cells]
        stall = await measure_loop(
            rig,
            clients=_STALL_CLIENTS,
            answer_tokens=_STALL_TOKENS,
            seconds=seconds,
            step_s=_STALL_STEP_S,
        )
        run.progress("open loops", 4, 5)
        direct_ms, routed_ms, beside_ms = await _latencies(rig, 2.0 if run.quick else 6.0)
    return Measured(
        windows=windows,
        request=median_loop(requests),
        cells=measured,
        stall=stall,
        direct=direct_ms,
        routed=routed_ms,
        beside_long=beside_ms,
    )


async def _cell(rig: Rig, clients: int, tokens: int, seconds: float) -> Loop:
    return await measure_loop(rig, clients=clients, answer_tokens=tokens, seconds=seconds)


async def _latencies(rig: Rig, seconds: float) -> tuple[list[Ttft], list[Ttft], list[Ttft]]:
    """The three take turns, each round at other random times; a first short one does not count."""
    await routed(rig, 0, 0.5)
    direct_ms, routed_ms, beside_ms = [], [], []
    for seed in range(1, ROUNDS + 1):
        direct_ms.append(await direct(rig, seed, seconds))
        routed_ms.append(await routed(rig, seed, seconds))
        beside_ms.append(await routed(rig, seed, seconds, long_prompts=True))
    return direct_ms, routed_ms, beside_ms


# -- what it means ------------------------------------------------------------------------------


def _finding(measured: Measured) -> Finding:
    token_us = statistics.median(window.cpu_us_per_token for window in measured.windows)
    request_us = measured.request.cpu_us_per_answer
    added_p50 = _median(
        [r.p50 - d.p50 for r, d in zip(measured.routed, measured.direct, strict=True)]
    )
    added_p99 = _median(
        [r.p99 - d.p99 for r, d in zip(measured.routed, measured.direct, strict=True)]
    )
    pairs = zip(measured.beside_long, measured.routed, strict=True)
    moved_ms = _median([beside.p99 - alone.p99 for beside, alone in pairs])
    headline = next(
        loop for loop in measured.cells if (loop.clients, loop.answer_tokens) == HEADLINE_CELL
    )
    events = sum(window.events for window in measured.windows)
    coalesced = events - sum(window.reads for window in measured.windows)
    keys: dict[str, Json] = {
        "cpu_us_per_token": round(token_us, 2),
        "cpu_us_per_request": round(request_us, 1),
        "added_ttft_ms_p50": round(added_p50, 3),
        "added_ttft_ms_p99": round(added_p99, 3),
        "long_prompt_moves_p99_ms": round(moved_ms, 3),
        "tokens_per_cpu_s": round(headline.tokens_per_cpu_s),
        "answers_per_cpu_s": {
            f"{loop.clients}x{loop.answer_tokens}": round(loop.answers_per_cpu_s)
            for loop in measured.cells
        },
        "coalesced_events": coalesced,
        "delayed_ack_stalls": measured.stall.stalls,
    }
    return Finding(
        tables=(_costs(measured, token_us, events, coalesced), _loops(measured), _ttfts(measured)),
        targets=(
            _below("router CPU per streamed token", token_us, TOKEN_TARGET_US, "us"),
            _below("router CPU per request of 1 KB", request_us, REQUEST_TARGET_US, "us"),
            _below("added time to first token, p50", added_p50, ADDED_P50_TARGET_MS, "ms"),
            _below("added time to first token, p99", added_p99, ADDED_P99_TARGET_MS, "ms"),
            _below(
                f"a prompt of {LONG_TOKENS} tokens moves the others' p99",
                moved_ms,
                LONG_MOVES_TARGET_MS,
                "ms",
            ),
            Target(
                promise="no pause of 40 ms for clients with delayed ACKs",
                measured=f"{measured.stall.stalls} pauses",
                held=measured.stall.stalls == 0,
            ),
        ),
        notes=(
            "Workers are stand-ins that speak the real RouterStream and take no model time; CPU is"
            " that of the router process, from the OS, everything included: HTTP, chat template,"
            " tokenizing, placement, detokenizing, SSE. Clients use delayed ACKs.",
            "closed loops: workers answer as fast as they can; 'shared' is the share of events that"
            " reached the client together with an earlier one.",
        ),
        keys=keys,
        draw=lambda axes: _draw(axes, measured),
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _below(what: str, value: float, limit: float, unit: str) -> Target:
    return Target(
        promise=f"{what}: at most {limit:g} {unit}",
        measured=f"{value:.2f} {unit}",
        held=value <= limit,
    )


def _costs(measured: Measured, token_us: float, events: int, coalesced: int) -> ResultTable:
    spread = [window.cpu_us_per_token for window in measured.windows]
    rate = statistics.median(window.events / window.seconds for window in measured.windows)
    return ResultTable(
        title="CPU of the router process",
        columns=("what", "us", "least..greatest", "per second", "coalesced"),
        texts=1,
        rows=(
            (
                f"a token, {STREAMS} streams at 20 ms",
                f"{token_us:.1f}",
                f"{min(spread):.1f}..{max(spread):.1f}",
                f"{rate:.0f}",
                f"{coalesced} of {events}",
            ),
            (
                f"a request, 1 KB prompt, {REQUEST_TOKENS} tokens",
                f"{measured.request.cpu_us_per_answer:.0f}",
                "",
                f"{measured.request.answers_per_s:.0f}",
                "",
            ),
        ),
    )


def _loops(measured: Measured) -> ResultTable:
    return ResultTable(
        title="closed loops, 1 KB prompts",
        columns=("clients", "tokens", "answers/s", "TTFT p50 ms", "answers/CPU-s", "shared"),
        texts=0,
        rows=tuple(
            (
                f"{loop.clients}",
                f"{loop.answer_tokens}",
                f"{loop.answers_per_s:.0f}",
                f"{loop.ttft_ms_p50:.1f}",
                f"{loop.answers_per_cpu_s:.0f}",
                f"{loop.coalesced_share:.0%}",
            )
            for loop in measured.cells
        ),
    )


def _ttfts(measured: Measured) -> ResultTable:
    rows = (
        ("worker reached directly", measured.direct),
        ("through the router", measured.routed),
        (f"the same beside prompts of {LONG_TOKENS} tokens", measured.beside_long),
    )
    return ResultTable(
        title=f"time to first token, open loop, {RATE_PER_S:g} requests/s: medians of {ROUNDS}",
        columns=("way", "p50 ms", "p99 ms"),
        texts=1,
        rows=tuple(
            (
                name,
                f"{_median([ttft.p50 for ttft in ttfts]):.2f}",
                f"{_median([ttft.p99 for ttft in ttfts]):.2f}",
            )
            for name, ttfts in rows
        ),
    )


def _draw(axes: Axes, measured: Measured) -> None:
    """Median and 99th percentile of each way."""
    ways = {"direct": measured.direct, "routed": measured.routed, "long": measured.beside_long}
    places = range(len(ways))
    axes.bar([p - 0.2 for p in places], [_median([t.p50 for t in w]) for w in ways.values()], 0.4)
    axes.bar([p + 0.2 for p in places], [_median([t.p99 for t in w]) for w in ways.values()], 0.4)
    axes.set_xticks(list(places), list(ways))
    axes.legend(["p50", "p99"])
    axes.set_ylabel("ms")
    axes.set_title("time to first token")


PART = Part(
    name="load",
    what="CPU per token and per request, closed loops, added time to first token",
    keys=(
        "cpu_us_per_token",
        "cpu_us_per_request",
        "added_ttft_ms_p50",
        "added_ttft_ms_p99",
        "long_prompt_moves_p99_ms",
        "tokens_per_cpu_s",
        "answers_per_cpu_s",
        "coalesced_events",
        "delayed_ack_stalls",
    ),
    run=run,
)
