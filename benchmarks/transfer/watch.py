"""A transport that remembers what was asked of it and when; it adds two clock readings per read."""

import asyncio
import time
from dataclasses import dataclass

from core.ids import ShardId
from kv_transfer.messages import Memory
from kv_transfer.plan import ReadPlan
from kv_transfer.transport import ReadStats, Sealed, Transport


@dataclass(slots=True)
class WatchedRead:
    """One read. Times are CLOCK_MONOTONIC, which all processes of a machine share."""

    peer: ShardId
    plan: ReadPlan
    asked_at_s: float
    ended_at_s: float = 0.0
    seconds: float = 0.0
    """As the transport counts them, on its own thread."""

    @property
    def begun_at_s(self) -> float:
        """When the transport began with it, at the latest: its end, as heard on the event loop,
        less the time it took.
        """
        return self.ended_at_s - self.seconds


class WatchedTransport:
    """Implements kv_transfer.transport.Transport by another one."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.reads: list[WatchedRead] = []

    @property
    def name(self) -> str:
        return self._inner.name

    def memory(self) -> Memory:
        return self._inner.memory()

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        await self._inner.connect(peer, memory)

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        read = WatchedRead(peer, plan, time.monotonic())
        self.reads.append(read)
        future = self._inner.start_read(peer, plan, sealed)

        def ended(done: "asyncio.Future[ReadStats]") -> None:
            read.ended_at_s = time.monotonic()
            if not done.cancelled() and done.exception() is None:
                read.seconds = done.result().seconds

        future.add_done_callback(ended)
        return future

    async def disconnect(self, peer: ShardId) -> None:
        await self._inner.disconnect(peer)

    async def failed(self) -> Exception:
        return await self._inner.failed()

    async def close(self) -> None:
        await self._inner.close()
