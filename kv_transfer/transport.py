"""The seam under which bytes move."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.ids import Incarnation
from kv_transfer.messages import Memory
from kv_transfer.plan import Descriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStats:
    """What a read moved, and how long it took on the transfer thread."""

    nbytes: int
    descriptors: int
    seconds: float


@dataclass(slots=True)
class TransportCounters:
    """Totals of one worker as a reader."""

    reads: int = 0
    failures: int = 0
    nbytes: int = 0
    descriptors: int = 0
    seconds: float = 0.0

    def add(self, stats: ReadStats) -> None:
        """Count a read that ended well."""
        self.reads += 1
        self.nbytes += stats.nbytes
        self.descriptors += stats.descriptors
        self.seconds += stats.seconds


class Transport(Protocol):
    """Moves bytes from a peer's arena into this worker's own; one-sided, the owner does nothing.

    Called on the event loop. `memory` is what a peer needs to read from here. `connect` comes
    before the first read from that incarnation, `disconnect` after the last one; both may repeat.
    `start_read` answers a future that ends when no more bytes can arrive: with ReadStats, or with
    TransferFailed. It is never cancelled: whoever stops waiting for it must keep the target blocks
    out of use until it is done. `close` ends all reads and frees what was registered.
    """

    @property
    def name(self) -> str: ...

    @property
    def counters(self) -> TransportCounters: ...

    def memory(self) -> Memory: ...

    async def connect(self, peer: Incarnation, memory: Memory) -> None: ...

    def start_read(
        self, peer: Incarnation, plan: Sequence[Descriptor]
    ) -> "asyncio.Future[ReadStats]": ...

    async def disconnect(self, peer: Incarnation) -> None: ...

    async def failed(self) -> Exception:
        """Wait until the transport itself has failed, and the worker with it; mostly for ever."""
        ...

    async def close(self) -> None: ...
