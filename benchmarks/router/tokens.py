"""Part `tokens`: CPU of the router per streamed token: many answers run, none begins or ends."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.router.client import Client, chat_body
from benchmarks.router.rig import STEP_S, Rig, hosted
from benchmarks.types import BenchFailed, Finding, Part, ResultTable, Run, at_most

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TARGET_US = 20.0
WINDOWS = 3

STREAMS = 256
_PROMPT_CHARS = 200
_ENDLESS_TOKENS = 100_000
_SETTLE_S = 0.5
_START_TIMEOUT_S = 30.0
_POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindow:
    """What passed in one window. `reads` are pieces in which clients got the events."""

    events: int
    reads: int
    cpu_s: float
    seconds: float

    @property
    def cpu_us_per_token(self) -> float:
        return self.cpu_s / self.events * 1e6


async def measure_tokens(rig: Rig, windows: int, seconds: float) -> list[TokenWindow]:
    """One token is one SSE event here; the texts of all of them are not empty."""
    rig.step(STEP_S)
    clients = [await Client.connect(rig.port) for _ in range(STREAMS)]
    try:
        for i, client in enumerate(clients):
            client.ask(chat_body(rig.model, rig.prompt(i, _PROMPT_CHARS), _ENDLESS_TOKENS))
        await until_spoken(clients)
        await asyncio.sleep(_SETTLE_S)
        return [await _window(rig, clients, seconds) for _ in range(windows)]
    finally:
        for client in clients:
            client.close()


async def until_spoken(clients: list[Client]) -> None:
    """Wait until every client has a token. Raises BenchFailed."""
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while not all(client.seen.events > 1 for client in clients):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise BenchFailed("not all streams began in time") from None


async def _window(rig: Rig, clients: list[Client], seconds: float) -> TokenWindow:
    loop = asyncio.get_running_loop()
    began_s, cpu_s = loop.time(), rig.cpu_s()
    events, reads = _counts(clients)
    await asyncio.sleep(seconds)
    now_events, now_reads = _counts(clients)
    return TokenWindow(
        events=now_events - events,
        reads=now_reads - reads,
        cpu_s=rig.cpu_s() - cpu_s,
        seconds=loop.time() - began_s,
    )


def _counts(clients: list[Client]) -> tuple[int, int]:
    return sum(c.seen.events for c in clients), sum(c.seen.reads for c in clients)


def run(run: Run) -> Finding:
    """Windows of one set of streams."""
    seconds = 0.6 if run.quick else 3.0
    run.progress(f"{STREAMS} streams", 0, 1)
    return _finding(hosted(run).run(lambda rig: measure_tokens(rig, WINDOWS, seconds)))


def _finding(windows: list[TokenWindow]) -> Finding:
    costs = [window.cpu_us_per_token for window in windows]
    token_us = statistics.median(costs)
    rate = statistics.median(window.events / window.seconds for window in windows)
    events = sum(window.events for window in windows)
    coalesced = events - sum(window.reads for window in windows)
    row = (
        f"{token_us:.1f}",
        f"{min(costs):.1f}..{max(costs):.1f}",
        f"{rate:.0f}",
        f"{coalesced} of {events}",
    )
    return Finding(
        tables=(
            ResultTable(
                title=f"CPU of the router process per token: {STREAMS} streams, a token every"
                f" {1e3 * STEP_S:g} ms",
                columns=("us", "least..greatest", "tokens/s", "coalesced"),
                texts=0,
                rows=(row,),
            ),
        ),
        targets=(at_most("router CPU per streamed token", token_us, TARGET_US, "us"),),
        notes=(
            "Workers are stand-ins that speak the real RouterStream and take no model time. Each"
            " token is detokenized and is one SSE event. Clients use delayed ACKs.",
        ),
        keys={"cpu_us_per_token": round(token_us, 2), "coalesced_events": coalesced},
        draw=lambda axes: _draw(axes, costs),
    )


def _draw(axes: Axes, costs: list[float]) -> None:
    axes.bar([f"window {i + 1}" for i in range(len(costs))], costs)
    axes.axhline(TARGET_US, color="gray", linestyle=":")
    axes.set(ylabel="us of CPU", title=f"one streamed token, {STREAMS} streams")


PART = Part(
    name="tokens",
    what="CPU per streamed token",
    keys=("cpu_us_per_token", "coalesced_events"),
    run=run,
)
