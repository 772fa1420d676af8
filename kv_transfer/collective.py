"""torch.distributed point-to-point: NCCL between two GPUs, Gloo otherwise. For where NIXL is not.
NCCL has never been run on devices here.

One group of two per reader and owner, made when the reader connects and ended with it: workers
come and go without a world that all of them belong to. Each end of a pair is served by a thread of
its own.

Bytes arrive in staging buffers and are copied into the arena from there, never once the read has
failed. So a failed read ends at once: nothing that arrives late can reach the arena. (Received into
the arena directly, long runs would be faster by a quarter, but a wait on Gloo cannot be given up
before its bound, and until then the target blocks would be lost.)
"""

import asyncio
import logging
import threading
import time

from core.errors import InternalError, TransferCause, TransferFailed
from core.ids import ShardId
from engine.arena import Arena
from kv_transfer.chunks import ArenaBytes
from kv_transfer.collective_group import Gate
from kv_transfer.collective_link import Home, describe, listen, tell
from kv_transfer.collective_owner import Door
from kv_transfer.collective_reader import Pair
from kv_transfer.messages import Memory
from kv_transfer.plan import ReadPlan
from kv_transfer.transport import ReadStats, Sealed

log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 5.0


class CollectiveTransport:
    """Implements kv_transfer.transport.Transport over torch.distributed.

    `host` is the address peers reach this worker by; it listens there, on a port of its own. A read
    that takes longer than `read_timeout_s` (more with many bytes, see traffic.py) has failed, and
    with it all others of that pair: connect again. A peer that does not answer within
    `connect_timeout_s` is none.

    Raises InternalError where Gloo or the port cannot be had.
    """

    name = "collective"

    def __init__(
        self,
        arena: Arena,
        host: str = "127.0.0.1",
        *,
        read_timeout_s: float = 10.0,
        connect_timeout_s: float = 3.0,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._arena = arena
        self._failed: asyncio.Future[Exception] = self._loop.create_future()
        self._pairs: dict[ShardId, Pair] = {}
        self._ended: set[Pair] = set()
        self._closed = False
        try:
            self._home = Home(
                arena=ArenaBytes(arena),
                gate=Gate(arena, host),
                read_timeout_s=read_timeout_s,
                connect_timeout_s=connect_timeout_s,
            )
            self._door = Door(self._home, listen(host), self._door_broke)
        except (OSError, RuntimeError) as error:
            raise InternalError(f"Gloo did not start on {host}: {describe(error)}") from error
        self._door.start()

    def memory(self) -> Memory:
        return Memory(
            transport=self.name,
            metadata=self._door.address.encode(),
            address=self._arena.address,
            nbytes=self._arena.nbytes,
            device=str(self._arena.data.device),
        )

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        if memory.transport != self.name:
            raise TransferFailed(
                f"the peer moves KV by {memory.transport}, this worker by collective",
                cause=TransferCause.NO_TRANSPORT,
            )
        if self._closed:
            raise TransferFailed("this worker is stopping", cause=TransferCause.NO_TRANSPORT)
        pair = self._pairs.get(peer)
        if pair is None or pair.failure is not None:
            await self.disconnect(peer)
            pair = self._pairs[peer] = Pair(self._home, peer, memory, self._loop)
            pair.start()
        try:
            async with asyncio.timeout(self._home.connect_timeout_s):
                await asyncio.shield(pair.ready)
        except TimeoutError:
            pair.end("no answer in time", TransferCause.NO_ANSWER)
            raise TransferFailed(
                f"no answer from the KV transport of {peer}", cause=TransferCause.NO_ANSWER
            ) from None

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        """See Transport. Both ends take part in every read: no seal is read past the owner."""
        pair = self._pairs.get(peer)
        if pair is not None:
            return pair.read(plan)
        future: asyncio.Future[ReadStats] = self._loop.create_future()
        future.set_exception(
            TransferFailed(f"not connected to {peer}", cause=TransferCause.READ_FAILED)
        )
        return future

    async def disconnect(self, peer: ShardId) -> None:
        self._ended = {pair for pair in self._ended if pair.thread.is_alive()}
        pair = self._pairs.pop(peer, None)
        if pair is not None:
            pair.end("disconnected", TransferCause.READ_FAILED)
            self._ended.add(pair)

    async def failed(self) -> Exception:
        return await asyncio.shield(self._failed)

    async def close(self) -> None:
        """Pending reads fail; threads end, at the latest when their own waits do."""
        self._closed = True
        for peer in list(self._pairs):
            await self.disconnect(peer)
        self._door.close()
        threads = [pair.thread for pair in self._ended] + self._door.threads()
        await asyncio.to_thread(_join, threads, time.monotonic() + _STOP_TIMEOUT_S)
        stuck = sum(thread.is_alive() for thread in threads)
        if stuck:
            log.warning("transfer_threads_stuck count=%d timeout_s=%s", stuck, _STOP_TIMEOUT_S)
        self._home.gate.close()

    def _door_broke(self, error: Exception) -> None:
        def settle() -> None:
            if not self._failed.done():
                self._failed.set_result(error)

        tell(self._loop, settle)


def _join(threads: list[threading.Thread], until_s: float) -> None:
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))
