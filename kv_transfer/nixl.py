"""NIXL: RDMA, NVLink, shared memory or TCP, whatever UCX finds between the two workers.

This is its side on the event loop. The agent belongs to a thread (nixl_thread.py), as a read over
shared memory copies inside the post call itself and one over TCP stays in progress and is polled:
neither the event loop nor the engine waits for it.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from core.errors import InternalError, TransferCause, TransferFailed
from core.ids import Incarnation, ShardId
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.nixl_commands import Command, fail
from kv_transfer.nixl_thread import TransferThread
from kv_transfer.plan import ReadPlan
from kv_transfer.seals import Seals
from kv_transfer.transport import QueuedRead, ReadStats, Sealed

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 5.0
_WATCH_S = 5.0
_STUCK_S = 120.0
"""No single call into NIXL takes so long; over shared memory the longest copies for seconds."""


class NixlTransport:
    """Implements kv_transfer.transport.Transport over NIXL's UCX backend.

    A read that is not over in time (`read_timeout_s` and more beside others, see traffic.py), and
    any error of NIXL that is not plainly the loss of one peer, costs the agent: it is destroyed,
    its reads fail with READ_SLOW or READ_FAILED, and the next one takes its place, with the same
    arena under new metadata. The peer at fault must be connected again; the other way, peers that
    read from here must fetch the new metadata. A peer that is gone costs only the reads from it:
    OWNER_LOST.
    """

    name = "nixl"

    def __init__(
        self,
        arena: Arena,
        incarnation: Incarnation,
        read_timeout_s: float = 10.0,
        seals: Seals | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._arena = arena
        self._failed: asyncio.Future[Exception] = self._loop.create_future()
        self._ended: str | None = None
        self._seals = seals
        self._thread = TransferThread(
            arena,
            incarnation,
            read_timeout_s,
            seals=seals,
            call=self._call,
            failed=self._thread_failed,
        )
        self._thread.start(_START_TIMEOUT_S)

    def memory(self) -> Memory:
        """Changes when the agent was rebuilt."""
        return Memory(
            transport=self.name,
            metadata=self._thread.metadata,
            address=self._arena.address,
            nbytes=self._arena.nbytes,
            device=self._thread.device,
            seal_address=self._seals.address if self._seals is not None else 0,
            seal_slots=len(self._seals.words) if self._seals is not None else 0,
        )

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        """Raises TransferFailed: the peer cannot be reached this way."""
        if memory.transport != self.name:
            raise TransferFailed(
                f"the peer moves KV by {memory.transport}, this worker by nixl",
                cause=TransferCause.NO_TRANSPORT,
            )
        future: asyncio.Future[None] = self._loop.create_future()
        self._submit(
            Command(
                lambda: self._thread.connect(peer, memory, future),
                future,
                refused=TransferCause.NO_TRANSPORT,
            )
        )
        await future

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        """See Transport. A plan of nothing ends at once."""
        future = QueuedRead(loop=self._loop)
        if plan.descriptors:
            self._submit(Command(lambda: self._thread.read(peer, plan, future, sealed), future))
        else:
            future.set_result(ReadStats(nbytes=0, descriptors=0, seconds=0.0))
        return future

    async def disconnect(self, peer: ShardId) -> None:
        """See Transport."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._submit(Command(lambda: self._thread.disconnect(peer, future), future))
        with suppress(TransferFailed):  # the thread has ended, and no peer is known any more
            await future

    async def failed(self) -> Exception:
        """See Transport. A thread that does not come back from a call into NIXL has failed too."""
        while True:
            try:
                async with asyncio.timeout(_WATCH_S):
                    return await asyncio.shield(self._failed)
            except TimeoutError:
                busy_since_s = self._thread.busy_since_s
                if busy_since_s is not None and time.monotonic() - busy_since_s > _STUCK_S:
                    return InternalError(f"a call into NIXL took longer than {_STUCK_S:g} s")

    async def close(self) -> None:
        """End all reads and free what was registered."""
        if not await asyncio.to_thread(self._thread.stop, _STOP_TIMEOUT_S):
            log.warning("transfer_thread_stuck timeout_s=%s", _STOP_TIMEOUT_S)
        self._end("this worker is stopping")

    def _submit(self, command: Command) -> None:
        self._thread.submit(command)
        if self._ended is not None:
            self._end(self._ended)

    def _thread_failed(self, error: Exception) -> None:
        if not self._failed.done():
            self._failed.set_result(error)
        self._end(str(error))

    def _end(self, reason: str) -> None:
        """Nobody runs commands any more."""
        self._ended = reason
        for command in self._thread.take_left_over():
            fail(command.future, reason, TransferCause.READ_FAILED)

    def _call(self, settle: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the event loop is closed: nobody waits any more
            log.info("transfer_result_unheard")
