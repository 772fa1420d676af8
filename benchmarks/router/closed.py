"""Part `loops`: what a request costs the router, and closed loops at several sizes."""

from __future__ import annotations

import time
from dataclasses import dataclass

from benchmarks.router.client import chat_body
from benchmarks.router.loops import (
    PROMPT_CHARS,
    STALL_TOKENS,
    Bodies,
    Loop,
    measure_loop,
    measure_stalls,
    median_loop,
    warm,
)
from benchmarks.router.rig import Rig, hosted
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target, at_most

REQUEST_TARGET_US = 700.0
ROUNDS = 3
REQUEST_CLIENTS, REQUEST_TOKENS = 8, 2
_CELLS = ((32, 16), (32, 128), (256, 16), (256, 128))
"""Clients and tokens per answer."""
HEADLINE = (32, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Medians, but for `stall`."""

    request: Loop
    cells: list[Loop]
    stall: Loop


def run(run: Run) -> Finding:
    """Prompts of 1 KB, each different from its first words on."""
    return _finding(hosted(run).run(lambda rig: _measure(run, rig)))


async def _measure(run: Run, rig: Rig) -> Measured:
    seconds, rounds = (0.5, 1) if run.quick else (2.0, ROUNDS)
    cells = _CELLS[:2] if run.quick else _CELLS
    await warm(rig, _bodies(rig, REQUEST_TOKENS), clients=REQUEST_CLIENTS)
    requests: list[Loop] = []
    measured: dict[tuple[int, int], list[Loop]] = {cell: [] for cell in cells}
    for i in range(ROUNDS):
        run.progress("requests and closed loops", i, ROUNDS)
        requests.append(await _loop(rig, (REQUEST_CLIENTS, REQUEST_TOKENS), seconds))
        for cell in cells if i < rounds else ():
            measured[cell].append(await _loop(rig, cell, seconds))
    return Measured(
        request=median_loop(requests),
        cells=[median_loop(loops) for loops in measured.values()],
        stall=await measure_stalls(rig, _bodies(rig, STALL_TOKENS), seconds),
    )


async def _loop(rig: Rig, cell: tuple[int, int], seconds: float) -> Loop:
    clients, tokens = cell
    body = _bodies(rig, tokens)
    return await measure_loop(rig, body, clients=clients, answer_tokens=tokens, seconds=seconds)


def _bodies(rig: Rig, tokens: int) -> Bodies:
    first = time.monotonic_ns()
    return lambda number: chat_body(rig.model, rig.prompt(first + number, PROMPT_CHARS), tokens)


def _finding(measured: Measured) -> Finding:
    request, stall = measured.request, measured.stall
    headline = next(loop for loop in measured.cells if _cell(loop) == HEADLINE)
    per_cpu_s: dict[str, Json] = {
        f"{loop.clients}x{loop.answer_tokens}": round(loop.answers_per_cpu_s)
        for loop in measured.cells
    }
    return Finding(
        tables=(loops_table([request, *measured.cells]),),
        targets=(
            at_most(
                "router CPU per request of 1 KB", request.cpu_us_per_answer, REQUEST_TARGET_US, "us"
            ),
            Target(
                promise="no pause of 40 ms for clients with delayed ACKs",
                measured=f"{stall.stalls} pauses in {stall.answers} answers",
                held=stall.stalls == 0,
            ),
        ),
        notes=(
            "Workers answer as fast as they can; 'shared' is the share of events that reached the"
            " client together with an earlier one. CPU is that of the router process, from the OS,"
            " everything included: HTTP, chat template, tokenizing, placement, detokenizing, SSE.",
        ),
        keys={
            "cpu_us_per_request": round(request.cpu_us_per_answer, 1),
            "tokens_per_cpu_s": round(headline.tokens_per_cpu_s),
            "answers_per_cpu_s": per_cpu_s,
            "delayed_ack_stalls": stall.stalls,
        },
    )


def _cell(loop: Loop) -> tuple[int, int]:
    return loop.clients, loop.answer_tokens


def loops_table(loops: list[Loop]) -> ResultTable:
    """One row per loop."""
    columns = ("clients", "tokens", "answers/s", "CPU us/answer", "answers/CPU-s", "tokens/CPU-s")
    return ResultTable(
        title="closed loops through the router, 1 KB prompts",
        columns=(*columns, "TTFT p50 ms", "p99 ms", "shared"),
        texts=0,
        rows=tuple(
            (
                f"{loop.clients}",
                f"{loop.answer_tokens}",
                f"{loop.answers_per_s:.0f}",
                f"{loop.cpu_us_per_answer:.0f}",
                f"{loop.answers_per_cpu_s:.0f}",
                f"{loop.tokens_per_cpu_s:.0f}",
                f"{loop.ttft_ms_p50:.1f}",
                f"{loop.ttft_ms_p99:.1f}",
                f"{loop.coalesced_share:.0%}",
            )
            for loop in loops
        ),
    )


PART = Part(
    name="loops",
    what="CPU per request, closed loops, pauses of delayed ACKs",
    keys=("cpu_us_per_request", "tokens_per_cpu_s", "answers_per_cpu_s", "delayed_ack_stalls"),
    run=run,
)
