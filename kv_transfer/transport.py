"""The seam under which bytes move."""

import asyncio
from dataclasses import dataclass
from typing import Protocol

from core.ids import ShardId
from kv_transfer.messages import Memory, Seal
from kv_transfer.plan import ReadPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadStats:
    """What a read moved, and how long it took on the transfer thread. `sealed`: see Sealed."""

    nbytes: int
    descriptors: int
    seconds: float
    sealed: bool = False


class QueuedRead(asyncio.Future[ReadStats]):
    """A read of a transport that begins it later, perhaps on another thread."""

    given_up = False
    """One that has not begun then never does: it fails when its turn comes."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """Asked beside the last read of a hand-off: whether `seal` was whole at its owner when this
    read and those in `after`, begun before it, had ended (seals.py). A transport that cannot tell,
    or would have to wait for the others, says that it was not.
    """

    seal: Seal
    after: "tuple[asyncio.Future[ReadStats], ...]" = ()


def give_up(read: "asyncio.Future[ReadStats]") -> None:
    """Nobody will use what it brings. Its target blocks stay out of use until it is done."""
    if isinstance(read, QueuedRead):
        read.given_up = True


class Transport(Protocol):
    """Moves bytes from a peer's arena into this worker's own. To both it looks one-sided: what a
    two-sided backend needs of the owner, its transport does there on a thread of its own.

    Called on the event loop. `memory` is what a peer needs to read from here; it may change when a
    transport had to start anew. `connect` comes before the first read from that shard, `disconnect`
    after the last one; both may repeat. `start_read` answers a future that ends when no more bytes
    can arrive: with ReadStats, or with TransferFailed. It is never cancelled: whoever stops waiting
    for it says so by `give_up` and keeps the target blocks out of use until it is done. A read from
    a dead or silent peer ends by the transport's own bound. `close` ends all reads and frees what
    was registered. Only `connect` raises, TransferFailed; what another call raises is a bug, which
    Transports contains.
    """

    @property
    def name(self) -> str: ...

    def memory(self) -> Memory: ...

    async def connect(self, peer: ShardId, memory: Memory) -> None: ...

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]": ...

    async def disconnect(self, peer: ShardId) -> None: ...

    async def failed(self) -> Exception:
        """Wait until the transport itself has failed, and the worker with it; mostly for ever."""
        ...

    async def close(self) -> None: ...
