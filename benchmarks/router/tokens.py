"""CPU of the router per streamed token: many answers run, none begins or ends."""

import asyncio
from dataclasses import dataclass

from benchmarks.router.client import Client, chat_body
from benchmarks.router.rig import STEP_S, Rig
from benchmarks.types import BenchFailed

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
