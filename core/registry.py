"""Who is there. The registry names workers; it never carries a request.

Workers register and renew; routers watch. A record that is not renewed within its TTL disappears
from the registry. Absence never removes a worker whose stream is alive: the watcher decides that.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from core.clock import Clock
from core.ids import Incarnation, ModelId, Role, WorkerId

MAX_TTL_S = 3600.0
"""No lease is longer: whatever is forgotten here is gone after an hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What a router must know to connect; everything else comes over the stream."""

    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    epoch: int
    address: str
    """Of its gRPC door: control calls."""
    router_address: str
    """Where routers open their stream."""
    model_id: ModelId
    pid: int
    network_domain: str = ""
    """Within which KV moves best; empty: the host of its addresses."""


class Registry(Protocol):
    """Workers call `register` at start and every ttl/3, `deregister` when they leave in order.

    A TTL is in (0, MAX_TTL_S]. Every call but `watch` raises Unavailable when the registry is away.
    Registering is idempotent and renews. A second incarnation under the same worker_id replaces
    the first; a deregister that names an older incarnation does nothing.
    """

    async def register(self, record: WorkerRecord, ttl_s: float) -> None: ...

    async def deregister(self, worker_id: WorkerId, incarnation: Incarnation) -> None: ...

    async def workers(self) -> tuple[WorkerRecord, ...]: ...

    def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        """The present records at once, then again after every change. Never ends by itself.

        While the registry is away nothing comes; it is no change.
        """
        ...


class MemoryRegistry:
    """The embedded default: one process holds the records; cluster/ serves them over gRPC."""

    def __init__(self, clock: Clock, sweep_s: float = 1.0) -> None:
        self._clock = clock
        self._sweep_s = sweep_s
        self._records: dict[WorkerId, WorkerRecord] = {}
        self._expires_s: dict[WorkerId, float] = {}
        self._changed = asyncio.Event()

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        self._expires_s[record.worker_id] = self._clock.now_s() + ttl_s
        if self._records.get(record.worker_id) != record:
            self._records[record.worker_id] = record
            self._notify()

    async def deregister(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        record = self._records.get(worker_id)
        if record is not None and record.incarnation == incarnation:
            del self._records[worker_id], self._expires_s[worker_id]
            self._notify()

    async def workers(self) -> tuple[WorkerRecord, ...]:
        self._sweep()
        return tuple(self._records.values())

    async def watch(self) -> AsyncIterator[tuple[WorkerRecord, ...]]:
        last: tuple[WorkerRecord, ...] | None = None
        while True:
            changed = self._changed
            now = await self.workers()
            if now != last:
                last = now
                yield now
            try:
                async with asyncio.timeout(self._sweep_s):
                    await changed.wait()
            except TimeoutError:
                continue

    def _sweep(self) -> None:
        now_s = self._clock.now_s()
        expired = [worker_id for worker_id, at_s in self._expires_s.items() if at_s <= now_s]
        for worker_id in expired:
            del self._records[worker_id], self._expires_s[worker_id]
        if expired:
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
