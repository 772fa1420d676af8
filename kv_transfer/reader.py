"""The reader's side of a hand-off: reserve, read what is announced, ask, and only then use it.

    connect -> bind -> (announce -> reserve once -> read)* -> last read ended -> close -> HELD

Whatever goes wrong, the reserved blocks are given back: at once when no read targets them, else
they are quarantined until the transport says that the read has ended.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from core.errors import DeadlineExceeded, TransferFailed
from core.ids import BlockId, Incarnation, SequenceId
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
    """Blocks `first_block` to `num_blocks` of a sequence, from the owner of a lease."""

    handoff: Handoff
    sequence_id: SequenceId
    first_block: int
    num_blocks: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """Usable blocks, one running reference each, and what the prefill ended with."""

    blocks: tuple[BlockId, ...]
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
                    first_block=request.first_block,
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

    async def reserve(self, count: int, lease: BoundLease) -> list[BlockId]:
        """Wait for `count` free blocks beside the headroom running sequences need to grow.

        Raises what ended the lease meanwhile.
        """
        async with self._turn:
            while True:
                if self._pool.available - count >= self._headroom() or self._is_idle(count):
                    blocks = self._pool.reserve(count)
                    if blocks is not None:
                        return blocks
                self._space.clear()
                if lease.failure is not None:
                    raise lease.failure
                try:
                    async with asyncio.timeout(_SPACE_RECHECK_S):
                        await self._space.wait()
                except TimeoutError:
                    continue

    def _is_idle(self, count: int) -> bool:
        return self._headroom() == 0 and self._pool.available >= count

    def start_read(
        self, owner: Incarnation, remote: list[BlockId], local: list[BlockId]
    ) -> "asyncio.Future[ReadStats]":
        """Post one read; see Transport.start_read for what the future means."""
        return self._transport.start_read(owner, plan_read(remote, local, self._block_bytes))

    def finish(self, blocks: list[BlockId], reads: "list[asyncio.Future[ReadStats]]") -> None:
        """Give reserved blocks back after a failure, those under a running read when it ends."""
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


class _Pull:
    """One pull: its reserved blocks and its reads."""

    def __init__(
        self, reader: Reader, connection: PeerConnection, lease: BoundLease, request: PullRequest
    ) -> None:
        self._reader = reader
        self._connection = connection
        self._lease = lease
        self._request = request
        self._local: list[BlockId] = []
        self._reads: list[asyncio.Future[ReadStats]] = []
        self._announced: set[int] = set()

    async def run(self) -> Pulled:
        """Read everything, ask the closing question, answer usable blocks or raise."""
        usable = False
        try:
            last = await self._read_all()
            if last.ended:
                return Pulled(
                    blocks=(), first_token=last.first_token, ended=True, nbytes=0, seconds=0.0
                )
            stats = await self._all_reads_ended()
            outcome = await self._connection.close_lease(
                self._request.handoff.lease_id, self._reader.read_timeout_s
            )
            if outcome is not LeaseOutcome.HELD:
                raise self._lease.failure or TransferFailed(
                    f"the KV owner did not confirm the blocks: {outcome.name}"
                )
            self._reader.accept(self._local)
            usable = True
        finally:
            if not usable:
                self._reader.finish(self._local, self._reads)
        return Pulled(
            blocks=tuple(self._local),
            first_token=last.first_token,
            ended=False,
            nbytes=sum(read.nbytes for read in stats),
            seconds=sum(read.seconds for read in stats),
        )

    async def _read_all(self) -> Announce:
        """Post a read per announcement; answers the final one."""
        wanted = set(range(self._request.first_block, self._request.num_blocks))
        final: Announce | None = None
        async for announce in self._lease.announcements:
            if announce.sequence_id != self._request.sequence_id:
                raise TransferFailed("the KV owner announced blocks of another sequence")
            final = announce if announce.final else final
            if final is not None and final.ended:
                return final
            fresh = [
                (announce.first_index + i, block_id)
                for i, block_id in enumerate(announce.block_ids)
                if announce.first_index + i in wanted
            ]
            if fresh:
                await self._read(fresh)
                wanted -= {index for index, _ in fresh}
            if final is not None and not wanted:
                return final
        raise self._lease.failure or TransferFailed("the KV owner announced no more")

    async def _read(self, fresh: list[tuple[int, BlockId]]) -> None:
        if not self._local:
            count = self._request.num_blocks - self._request.first_block
            self._local = await self._reader.reserve(count, self._lease)
        first = self._request.first_block
        self._reads.append(
            self._reader.start_read(
                self._connection.owner,
                [block_id for _, block_id in fresh],
                [self._local[index - first] for index, _ in fresh],
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
