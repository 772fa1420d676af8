"""The reader's side of a hand-off, and memory to read into.

    connect -> bind -> (announce -> reserve -> read)* -> last read ended -> close -> HELD -> usable

Whatever goes wrong, the reserved blocks are given back: at once when no read targets them, else
they are quarantined until the transport says that the read has ended. What a hand-off says and does
in between is in pull.py.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

from core.errors import DeadlineExceeded, InternalError
from core.ids import BlockHash, BlockId, SequenceId, WorkerId, shard_id
from core.messages import Handoff, PrefixSource
from engine.arena import Arena
from engine.pool import BlockPool
from kv_transfer.bound import BoundLease
from kv_transfer.client import OwnerAddress, PeerConnection
from kv_transfer.config import TransferConfig
from kv_transfer.connections import Connections
from kv_transfer.landing import Landing, Reserved
from kv_transfer.messages import PeerHello
from kv_transfer.metrics import PullStats, TransferMetrics, transfer_cost
from kv_transfer.plan import ArenaShape, plan_read
from kv_transfer.pull import Fetching, Pulling
from kv_transfer.transport import ReadStats, Sealed
from kv_transfer.transports import Transports

_SPACE_RECHECK_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """The KV of a sequence up to its context, or of a running one as far as it has come.

    `hashes` are those of the context's full blocks: what is cached here under them is not read
    again.
    """

    handoff: Handoff
    sequence_id: SequenceId
    hashes: Sequence[BlockHash]
    context_tokens: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """Usable blocks, one running reference each, and the tokens that follow the context.

    The first `cached_blocks` were here already. The blocks hold the KV of all tokens but the last.
    """

    blocks: tuple[BlockId, ...]
    cached_blocks: int
    tokens: tuple[int, ...]
    ended: bool
    stats: PullStats


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """The cached prefix `hashes`, from a worker that is believed to have it."""

    source: PrefixSource
    sequence_id: SequenceId
    hashes: Sequence[BlockHash]
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedPrefix:
    """The first blocks of a prefix, one running reference each; `cached_blocks` were here."""

    blocks: tuple[BlockId, ...]
    cached_blocks: int
    stats: PullStats


class Reader:
    """Entered once per worker (`async with`); pulls and fetches run inside."""

    def __init__(
        self,
        *,
        pool: BlockPool,
        arena: Arena,
        transports: Transports,
        hello: Callable[[], PeerHello],
        config: TransferConfig,
        headroom: Callable[[], int],
    ) -> None:
        self.pool = pool
        self.arena = arena
        self.config = config
        self.metrics = TransferMetrics()
        self._transports = transports
        self._headroom = headroom
        self._shape = ArenaShape(arena.layout, arena.num_blocks)
        self._fit = transfer_cost()
        self._connections = Connections(transports, hello, config)
        self._line: deque[BoundLease] = deque()
        """Who waits for memory. First come, first served: a long prompt is not starved."""

    async def __aenter__(self) -> "Reader":
        await self._connections.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._connections.__aexit__(kind, error, trace)

    # -- hand-offs ------------------------------------------------------------------------------

    async def pull(self, request: PullRequest) -> Pulled:
        """Bring the blocks here. Raises TransferFailed or DeadlineExceeded."""
        door = OwnerAddress(
            worker_id=request.handoff.owner_id,
            address=request.handoff.owner_address,
            incarnation=request.handoff.owner_incarnation,
        )
        async with self._in_time(door.worker_id, request.timeout_s):
            connection = await self._connections.to(door)
            lease_id = request.handoff.lease_id
            with connection.bind(lease_id, request.sequence_id) as lease:
                pulling = Pulling(
                    self,
                    connection,
                    lease,
                    sequence_id=request.sequence_id,
                    hashes=request.hashes,
                    context_tokens=request.context_tokens,
                    live=request.handoff.live,
                )
                final, landing = await pulling.run()
        self._count_soon(connection, landing.stats)
        return Pulled(
            blocks=landing.blocks,
            cached_blocks=landing.num_cached,
            tokens=final.tokens,
            ended=final.ended,
            stats=landing.stats,
        )

    async def fetch(self, request: FetchRequest) -> FetchedPrefix:
        """Bring what the source has of a prefix and this worker has not; the caller publishes it.

        Never waits for memory. Raises TransferFailed or DeadlineExceeded.
        """
        door = OwnerAddress(
            worker_id=request.source.worker_id,
            address=request.source.address,
            incarnation=request.source.incarnation,
        )
        async with self._in_time(door.worker_id, request.timeout_s):
            connection = await self._connections.to(door)
            fetching = Fetching(self, connection, request.sequence_id, request.hashes)
            landing = await fetching.run()
        self._count_soon(connection, landing.stats)
        return FetchedPrefix(
            blocks=landing.blocks, cached_blocks=landing.num_cached, stats=landing.stats
        )

    def predict_s(self, nbytes: int) -> float:
        """How long a hand-off of `nbytes` is likely to take, fitted to those that were."""
        return self._fit.predict(nbytes)

    def _count_soon(self, connection: PeerConnection, stats: PullStats) -> None:
        """Whoever waits for the blocks goes first."""
        asyncio.get_running_loop().call_soon(self._count, connection, stats)

    def _count(self, connection: PeerConnection, stats: PullStats) -> None:
        pair = self.metrics.pair(connection.door.worker_id)
        pair.transport = connection.transport_name
        pair.add(stats)
        if stats.nbytes:
            self._fit.add(stats.nbytes, stats.seconds)

    @asynccontextmanager
    async def _in_time(self, owner_id: WorkerId, timeout_s: float) -> AsyncIterator[None]:
        """Bounds a hand-off, and counts why it failed."""
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    yield
            except TimeoutError as error:
                raise DeadlineExceeded("the deadline passed while the KV was on its way") from error
        except BaseException as error:
            self.metrics.failed(owner_id, error)
            raise

    # -- memory ---------------------------------------------------------------------------------

    @property
    def waiting_for_memory(self) -> int:
        """Pulls that have no blocks to read into yet."""
        return len(self._line)

    def space_freed(self) -> None:
        """Blocks were freed: the pull that is next to get memory may look again."""
        if self._line:
            self._line[0].changed.set()

    async def reserve(
        self, hashes: Sequence[BlockHash], num_blocks: int, lease: BoundLease
    ) -> Reserved:
        """Wait for memory beside the headroom that running sequences need to grow.

        Takes the cached prefix and the rest in one step: a pull that waits holds nothing, so no
        two of them wait for each other. Raises what ended the lease meanwhile, wherever in the
        line it waits.
        """
        self._line.append(lease)
        try:
            while True:
                lease.changed.clear()
                lease.raise_failure()
                next_to_take = self._line[0] is lease
                if next_to_take:
                    reserved = self.try_reserve(self.pool.lookup(hashes), num_blocks)
                    if reserved is not None:
                        return reserved
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SPACE_RECHECK_S if next_to_take else None):
                        await lease.changed.wait()
        finally:
            self._line.remove(lease)
            self.space_freed()

    def reserve_now(self, hashes: Sequence[BlockHash], num_blocks: int) -> Reserved | None:
        """As `reserve`, if nobody waits and there is memory."""
        if self._line:
            return None
        return self.try_reserve(self.pool.lookup(hashes), num_blocks)

    def try_reserve(self, cached: list[BlockId], num_blocks: int) -> Reserved | None:
        """Take `cached`, and fresh blocks for the rest of `num_blocks`, now or not at all."""
        missing = num_blocks - len(cached)
        if self.pool.available_beside(cached) - missing < self._headroom():
            return None
        self.pool.acquire(cached)
        fresh = self.pool.reserve(missing)
        if fresh is None:
            raise InternalError("reserving failed although the blocks were counted")
        return Reserved(cached, fresh)

    def start_reads(
        self,
        connection: PeerConnection,
        remote: list[BlockId],
        local: list[BlockId],
        sealed: Sealed | None,
    ) -> "list[asyncio.Future[ReadStats]]":
        """Post the reads of these blocks, one per rank of the owner that has a part of them.
        `sealed` is for an owner of one rank.
        """
        plans = plan_read(connection.shapes, self._shape, remote, local)
        incarnation = connection.door.incarnation
        return [
            self._transports.start_read(shard_id(incarnation, rank), plan, sealed)
            for rank, plan in plans.items()
        ]

    def give_back(self, landing: Landing) -> None:
        """Release everything after a failure, blocks under a running read when it ends."""
        blocks = landing.fresh
        landing.give_up()
        self.pool.release(landing.cached)
        running = [read for read in landing.reads if not read.done()]
        for read in landing.reads:
            if read.done():
                read.exception()  # one failure has been raised already; the others say the same
        if not running:
            self.pool.abandon(blocks)
            self.space_freed()
            return
        self.pool.quarantine(blocks)
        left = len(running)

        def ended(read: "asyncio.Future[ReadStats]") -> None:
            nonlocal left
            read.exception()
            left -= 1
            if left == 0:
                self.pool.release_quarantined(blocks)
                self.space_freed()

        for read in running:
            read.add_done_callback(ended)
