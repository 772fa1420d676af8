"""Part `migration`: what a client sees when its running answer moves to another decode worker.

One prefill and two decode workers, each a process, and the router's own flow over them. Per context
length and repeat a new prompt is served, its answer moved once while it runs, and the request
dropped. The pause is the time between the last token of the source and the first of the
destination, where the client takes them; it includes the decode step that makes that token. Beside
it, what computing the same context again takes: this request's own prefill.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.transfer.fleet import flow_over, workers
from benchmarks.transfer.overlap import timed_engine
from benchmarks.transfer.path import SHM, ucx_tls
from benchmarks.types import BenchFailed, Finding, Json, Part, ResultTable, Run, Target
from core.ids import RequestId, Role
from core.sampling import SamplingParams
from router.flow import Flow
from router.types import Generated, GenerateRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLAT_TARGET = 2.0

_VOCAB_SIZE = 1000
_LONGEST_TOKENS = 8000
_ARENA_TOKENS = _LONGEST_TOKENS + 1024
_ROLES = (Role.PREFILL, Role.DECODE, Role.DECODE)
_DEADLINE_S = 60.0
_TOKENS_BEFORE, _TOKENS_AFTER = 8, 8
_FIRST_CONTACTS = 2
_PREFILL_MS_PER_TOKEN = 0.01424
"""Llama-3-8B on an H100: recomputing is as quick as it gets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """One migration, in seconds. `step_s` is the median gap between the other tokens."""

    pause_s: float
    step_s: float
    total_s: float
    prefill_s: float
    nbytes: int
    tokens_meanwhile: int


@dataclass(slots=True)
class _Client:
    """Takes an answer's tokens, and notes when each came."""

    at_s: list[float] = field(default_factory=list)
    started_s: float = field(default_factory=time.monotonic)
    enough: int | None = None
    """Tokens after which it leaves."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, answer: AsyncGenerator[Generated, None]) -> None:
        async with aclosing(answer):
            async for item in answer:
                self.at_s += [time.monotonic()] * len(item.tokens)
                self.changed.set()
                if self.enough is not None and len(self.at_s) >= self.enough:
                    return

    async def until(self, tokens: int) -> None:
        """Wait for so many tokens."""
        while len(self.at_s) < tokens:
            self.changed.clear()
            await self.changed.wait()


def run(run: Run) -> Finding:
    """All context lengths; over shared memory, in host memory."""
    contexts = (256, 2048, 8000) if run.quick else (256, 512, 1024, 2048, 4096, 8000)
    repeats = 5 if run.quick else 9
    engine = timed_engine(_ARENA_TOKENS, _ARENA_TOKENS, _PREFILL_MS_PER_TOKEN)
    run.progress("starting three workers", 0, 1)
    with workers(run.zygote, engine, _VOCAB_SIZE, _ROLES, ucx_tls(SHM, "cpu")) as fleet:
        config, records = fleet

        async def measure() -> dict[int, list[Moved]]:
            async with flow_over(config, records) as flow:
                return await _measure_all(flow, contexts, repeats, run)

        return _finding(asyncio.run(measure()))


async def _measure_all(
    flow: Flow, contexts: tuple[int, ...], repeats: int, run: Run
) -> dict[int, list[Moved]]:
    """Lengths in turn, after a move each way that does not count: first contact."""
    moved: dict[int, list[Moved]] = {context: [] for context in contexts}
    turns = [min(contexts)] * _FIRST_CONTACTS + list(contexts) * repeats
    for i, context in enumerate(turns):
        run.progress(f"{context} tokens", i, len(turns))
        async with asyncio.timeout(_DEADLINE_S):
            one = await _measure(flow, context, number=i)
        if i >= _FIRST_CONTACTS:
            moved[context].append(one)
    return moved


async def _measure(flow: Flow, context: int, number: int) -> Moved:
    """One answer, moved once."""
    request_id = RequestId(f"migration-{number}")
    request = GenerateRequest(
        request_id=request_id,
        choice=0,
        prompt_tokens=(number % _VOCAB_SIZE, *(i % _VOCAB_SIZE for i in range(1, context))),
        sampling=SamplingParams(max_tokens=_ARENA_TOKENS - context, temperature=0.0),
        deadline_s=_DEADLINE_S,
    )
    client = _Client()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.take(flow.generate(request)))
        await client.until(_TOKENS_BEFORE)
        report = await flow.migrate(request_id, 0, None, _DEADLINE_S)
        first_there = len(client.at_s)
        client.enough = first_there + _TOKENS_AFTER
    if not report.moved:
        raise BenchFailed(f"a sequence of {context} tokens did not move: {report.reason}")
    gaps = [later - at for at, later in zip(client.at_s[1:], client.at_s[2:], strict=False)]
    return Moved(
        pause_s=report.pause_s,
        step_s=statistics.median(gaps),
        total_s=report.total_s,
        prefill_s=client.at_s[0] - client.started_s,
        nbytes=report.transfer_bytes,
        tokens_meanwhile=report.tokens_meanwhile,
    )


# -- what it means ------------------------------------------------------------------------------


def _finding(moved: dict[int, list[Moved]]) -> Finding:
    pauses_ms = {context: _ms([one.pause_s for one in ones]) for context, ones in moved.items()}
    recompute_ms = {
        context: _ms([one.prefill_s for one in ones]) for context, ones in moved.items()
    }
    spread = max(pauses_ms.values()) / min(pauses_ms.values())
    return Finding(
        tables=(
            ResultTable(
                title="moving a running answer: medians, ms",
                columns=(
                    "context",
                    "KV MiB",
                    "pause",
                    "least..greatest",
                    "a usual step",
                    "whole move",
                    "tokens meanwhile",
                    "recompute",
                ),
                texts=0,
                rows=tuple(_cells(context, ones) for context, ones in moved.items()),
            ),
        ),
        targets=(
            Target(
                promise=f"a move's pause is flat within {FLAT_TARGET:g}x, whatever the context",
                measured=f"{spread:.2f}x between the least and the greatest median",
                held=spread <= FLAT_TARGET,
            ),
        ),
        notes=(
            "pause: at the client, from the source's last token to the destination's first, one"
            " decode step included. recompute: prefill of the same context as on an H100.",
        ),
        keys={
            "migration_pause_ms": _by_context(pauses_ms),
            "migration_recompute_ms": _by_context(recompute_ms),
            "migration_step_ms": round(
                _ms([one.step_s for ones in moved.values() for one in ones]), 3
            ),
        },
        draw=lambda axes: _draw(axes, pauses_ms, recompute_ms),
    )


def _ms(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def _by_context(values_ms: dict[int, float]) -> Json:
    return {str(context): round(value_ms, 3) for context, value_ms in values_ms.items()}


def _cells(context: int, ones: list[Moved]) -> tuple[str, ...]:
    pauses_ms = [one.pause_s * 1e3 for one in ones]
    return (
        f"{context}",
        f"{ones[0].nbytes >> 20}",
        f"{statistics.median(pauses_ms):.2f}",
        f"{min(pauses_ms):.2f}..{max(pauses_ms):.2f}",
        f"{_ms([one.step_s for one in ones]):.2f}",
        f"{_ms([one.total_s for one in ones]):.1f}",
        f"{statistics.median(one.tokens_meanwhile for one in ones):.0f}",
        f"{_ms([one.prefill_s for one in ones]):.1f}",
    )


def _draw(axes: Axes, pauses_ms: dict[int, float], recompute_ms: dict[int, float]) -> None:
    """Pause and recompute over context length."""
    axes.plot(list(pauses_ms), list(pauses_ms.values()), marker="o", label="pause of a live move")
    axes.plot(list(recompute_ms), list(recompute_ms.values()), marker="s", label="recompute")
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="tokens of context", ylabel="ms", title="moving a running answer")
    axes.legend(fontsize=8)


PART = Part(
    name="migration",
    what="the pause a client sees when its answer moves to another worker",
    keys=("migration_pause_ms", "migration_recompute_ms", "migration_step_ms"),
    run=run,
)
