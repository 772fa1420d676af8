"""The reader's side of a hand-off: reserve, read what is announced, ask, and only then use it.

    connect -> bind -> (announce -> reserve once -> read)* -> last read ended -> close -> HELD

Whatever goes wrong, the reserved blocks are given back: at once when no read targets them, else
they are quarantined until the transport says that the read has ended.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from core.errors import DeadlineExceeded, InternalError, TransferFailed
from core.ids import BlockHash, BlockId, Incarnation, SequenceId
from core.messages import Handoff
from engine.pool import BlockPool
from kv_transfer.client import BoundLease, PeerConnection
from kv_transfer.config import TransferConfig
from kv_transfer.messages import Announce, Bind, LeaseOutcome, PeerHello
from kv_transfer.plan import plan_read
from kv_transfer.transport import ReadStats, Transport

log = logging.getLogger(__name__)

_SPACE_RECHECK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """The first `num_blocks` blocks of a sequence, from the owner of a lease.

    `hashes` are those of its full blocks: what is cached here under them is not read again.
    """

    handoff: Handoff
    sequence_id: SequenceId
    hashes: Sequence[BlockHash]
    num_blocks: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """Usable blocks, one running reference each, and what the prefill ended with.

    The first `cached_blocks` were here already.
    """

    blocks: tuple[BlockId, ...]
    cached_blocks: int
    first_token: int
    ended: bool
    nbytes: int
    seconds: float


class Reader:
    """Entered once per worker (`async with`); pulls run inside."""

    def __init__(
        self,
        pool: BlockPool,
        transport: Transport,
        hello: PeerHello,
        config: TransferConfig,
        headroom: Callable[[], int],
    ) -> None:
        self._pool = pool
        self._transport = transport
        self._hello = hello
        self._config = config
        self._headroom = headroom
        self._block_bytes = hello.layout.block_bytes
        self._tasks = asyncio.TaskGroup()
        self._connections: dict[Incarnation, tuple[PeerConnection, asyncio.Task[None]]] = {}
        self._space = asyncio.Event()
        self._turn = asyncio.Lock()  # first come, first served: a long prompt is not starved

    async def __aenter__(self) -> "Reader":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _, task in self._connections.values():
            task.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    def space_freed(self) -> None:
        """Blocks were freed: a pull that waits for memory may look again."""
        self._space.set()

    async def pull(self, request: PullRequest) -> Pulled:
        """Bring the blocks here. Raises TransferFailed or DeadlineExceeded."""
        try:
            async with asyncio.timeout(request.timeout_s):
                connection = await self._connect(request.handoff)
                bind = Bind(
                    lease_id=request.handoff.lease_id,
                    sequence_id=request.sequence_id,
                    first_block=0,
                )
                async with connection.bind(bind) as lease:
                    return await _Pull(self, connection, lease, request).run()
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed while the KV was on its way") from error

    async def _connect(self, handoff: Handoff) -> PeerConnection:
        known = self._connections.get(handoff.owner_incarnation)
        if known is None or known[0].lost:
            connection = PeerConnection(
                handoff, self._hello, self._transport, self._config.lease_s / 3
            )
            task = self._tasks.create_task(self._serve(connection))
            known = self._connections[handoff.owner_incarnation] = (connection, task)
        try:
            async with asyncio.timeout(self._config.connect_timeout_s):
                await asyncio.shield(known[0].ready)
        except TimeoutError as error:
            known[1].cancel()
            raise TransferFailed(f"no answer from the KV owner {handoff.owner_id}") from error
        return known[0]

    async def _serve(self, connection: PeerConnection) -> None:
        try:
            await connection.run()
        except Exception:  # the root of the connection's task
            log.exception("peer_connection_bug owner=%s", connection.owner)
        finally:
            known = self._connections.get(connection.owner)
            if known is not None and known[0] is connection:
                del self._connections[connection.owner]

    async def reserve(self, request: PullRequest, lease: BoundLease) -> "Reserved":
        """Wait for memory beside the headroom that running sequences need to grow.

        Takes the cached prefix and the rest in one step: a pull that waits holds nothing, so no
        two of them wait for each other. Raises what ended the lease meanwhile.
        """
        async with self._turn:
            while True:
                cached = self._pool.lookup(request.hashes)
                missing = request.num_blocks - len(cached)
                if self._pool.available_beside(cached) - missing >= self._headroom():
                    self._pool.acquire(cached)
                    fresh = self._pool.reserve(missing)
                    if fresh is None:
                        raise InternalError("reserving failed although the blocks were counted")
                    return Reserved(cached, fresh)
                self._space.clear()
                if lease.failure is not None:
                    raise lease.failure
                try:
                    async with asyncio.timeout(_SPACE_RECHECK_S):
                        await self._space.wait()
                except TimeoutError:
                    continue

    def start_read(
        self, owner: Incarnation, remote: list[BlockId], local: list[BlockId]
    ) -> "asyncio.Future[ReadStats]":
        """Post one read; see Transport.start_read for what the future means."""
        return self._transport.start_read(owner, plan_read(remote, local, self._block_bytes))

    def finish(self, reserved: "Reserved", reads: "list[asyncio.Future[ReadStats]]") -> None:
        """Give everything back after a failure, blocks under a running read when it ends."""
        blocks = reserved.fresh
        self._pool.release(reserved.cached)
        running = [read for read in reads if not read.done()]
        for read in reads:
            if read.done():
                read.exception()  # one failure has been raised already; the others say the same
        if not running:
            self._pool.abandon(blocks)
            self.space_freed()
            return
        self._pool.quarantine(blocks)
        left = len(running)

        def ended(read: "asyncio.Future[ReadStats]") -> None:
            nonlocal left
            read.exception()
            left -= 1
            if left == 0:
                self._pool.release_quarantined(blocks)
                self.space_freed()

        for read in running:
            read.add_done_callback(ended)

    def accept(self, blocks: list[BlockId]) -> None:
        """The owner said HELD."""
        self._pool.received(blocks)

    @property
    def read_timeout_s(self) -> float:
        return self._config.read_timeout_s


@dataclass(frozen=True, slots=True)
class Reserved:
    """The blocks of one pull: those cached here, and the targets of its reads, in order."""

    cached: list[BlockId]
    fresh: list[BlockId]


class _Pull:
    """One pull: its reserved blocks and its reads."""

    def __init__(
        self, reader: Reader, connection: PeerConnection, lease: BoundLease, request: PullRequest
    ) -> None:
        self._reader = reader
        self._connection = connection
        self._lease = lease
        self._request = request
        self._reserved: Reserved | None = None
        self._reads: list[asyncio.Future[ReadStats]] = []

    async def run(self) -> Pulled:
        """Read everything, ask the closing question, answer usable blocks or raise."""
        usable = False
        try:
            last = await self._read_all()
            if last.ended:
                return Pulled(
                    blocks=(),
                    cached_blocks=0,
                    first_token=last.first_token,
                    ended=True,
                    nbytes=0,
                    seconds=0.0,
                )
            reserved = await self._reserve()
            stats = await self._all_reads_ended()
            outcome = await self._connection.close_lease(
                self._request.handoff.lease_id, self._reader.read_timeout_s
            )
            if outcome is not LeaseOutcome.HELD:
                raise self._lease.failure or TransferFailed(
                    f"the KV owner did not confirm the blocks: {outcome.name}"
                )
            self._reader.accept(reserved.fresh)
            usable = True
        finally:
            if not usable and self._reserved is not None:
                self._reader.finish(self._reserved, self._reads)
        return Pulled(
            blocks=(*reserved.cached, *reserved.fresh),
            cached_blocks=len(reserved.cached),
            first_token=last.first_token,
            ended=False,
            nbytes=sum(read.nbytes for read in stats),
            seconds=sum(read.seconds for read in stats),
        )

    async def _read_all(self) -> Announce:
        """Post a read per announcement; answers the final one."""
        wanted = set(range(self._request.num_blocks))
        final: Announce | None = None
        async for announce in self._lease.announcements:
            if announce.sequence_id != self._request.sequence_id:
                raise TransferFailed("the KV owner announced blocks of another sequence")
            final = announce if announce.final else final
            if final is not None and final.ended:
                return final
            announced = [
                (announce.first_index + i, block_id)
                for i, block_id in enumerate(announce.block_ids)
                if announce.first_index + i in wanted
            ]
            if announced:
                await self._read(announced)
                wanted -= {index for index, _ in announced}
            if final is not None and not wanted:
                return final
        raise self._lease.failure or TransferFailed("the KV owner announced no more")

    async def _reserve(self) -> Reserved:
        if self._reserved is None:
            self._reserved = await self._reader.reserve(self._request, self._lease)
        return self._reserved

    async def _read(self, announced: list[tuple[int, BlockId]]) -> None:
        reserved = await self._reserve()
        first = len(reserved.cached)
        missing = [(index, block_id) for index, block_id in announced if index >= first]
        if missing:
            self._reads.append(
                self._reader.start_read(
                    self._connection.owner,
                    [block_id for _, block_id in missing],
                    [reserved.fresh[index - first] for index, _ in missing],
                )
            )

    async def _all_reads_ended(self) -> list[ReadStats]:
        """Wait for the posted reads; the end of the lease, or of patience, ends the waiting."""
        give_up_s = time.monotonic() + self._reader.read_timeout_s
        waiting: set[asyncio.Future[ReadStats]] = set(self._reads)
        while waiting and self._lease.failure is None:
            left_s = give_up_s - time.monotonic()
            over: set[asyncio.Future[Any]] = {*waiting, self._lease.closed}
            done, _ = await asyncio.wait(
                over,
                timeout=max(0.0, left_s),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done:
                log.warning("kv_read_slow sequence=%s", self._request.sequence_id)
                raise TransferFailed("a KV read did not end in time")
            waiting = {read for read in waiting if not read.done()}
        if self._lease.failure is not None:
            raise self._lease.failure
        return [read.result() for read in self._reads]
