"""Blocks on their way: reserved here, read from the owner, usable once it says HELD."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from core.errors import TransferCause, TransferFailed
from core.ids import BlockHash, BlockId
from engine.arena import Arena
from engine.pool import BlockPool
from kv_transfer.bound import BoundLease
from kv_transfer.checksum import checksum_blocks, checksums_of, pick_blocks
from kv_transfer.client import PeerConnection
from kv_transfer.config import TransferConfig
from kv_transfer.messages import LeaseOutcome, Seal
from kv_transfer.metrics import PullStats, TransferMetrics
from kv_transfer.traffic import Share, patience_s
from kv_transfer.transport import ReadStats, Sealed, give_up


@dataclass(frozen=True, slots=True)
class Reserved:
    """The blocks of one hand-off: those cached here, and the targets of its reads, in order."""

    cached: list[BlockId]
    fresh: list[BlockId]


class Room(Protocol):
    """What a hand-off needs of the Reader, whose docstrings say what each does."""

    pool: BlockPool
    arena: Arena
    config: TransferConfig
    metrics: TransferMetrics

    async def reserve(
        self, hashes: Sequence[BlockHash], num_blocks: int, lease: BoundLease
    ) -> Reserved: ...

    def reserve_now(self, hashes: Sequence[BlockHash], num_blocks: int) -> Reserved | None: ...

    def try_reserve(self, cached: list[BlockId], num_blocks: int) -> Reserved | None: ...

    def start_reads(
        self,
        connection: PeerConnection,
        remote: list[BlockId],
        local: list[BlockId],
        sealed: Sealed | None,
    ) -> "list[asyncio.Future[ReadStats]]": ...

    def give_back(self, landing: "Landing") -> None: ...


class Landing:
    """The reads of one hand-off. Whoever made it calls Room.give_back unless `confirm` returned."""

    def __init__(
        self, room: Room, connection: PeerConnection, lease: BoundLease, reserved: Reserved
    ) -> None:
        self._room = room
        self._connection = connection
        self._lease = lease
        self.cached = reserved.cached
        self.fresh = reserved.fresh
        self.reads: list[asyncio.Future[ReadStats]] = []
        self._remote: dict[int, BlockId] = {}
        self._running = 0
        self._shares: list[Share] = []
        self._all_posted = False
        self._last: asyncio.Future[ReadStats] | None = None
        self._vouched = False
        self._verified: list[int] = []
        self._since_s = 0.0
        self._seconds = 0.0
        self._hidden_s = 0.0
        self.stats = PullStats()
        """Set when the reads have ended well."""

    @property
    def num_cached(self) -> int:
        return len(self.cached)

    @property
    def blocks(self) -> tuple[BlockId, ...]:
        """All blocks of the sequence, in order."""
        return (*self.cached, *self.fresh)

    @property
    def all_here(self) -> bool:
        """No posted read is under way."""
        return self._running == 0

    def _sum_up(self) -> PullStats:
        """Of a hand-off whose reads have ended well."""
        ended = [read.result() for read in self.reads]
        return PullStats(
            nbytes=sum(read.nbytes for read in ended),
            blocks=len(self._remote),
            descriptors=sum(read.descriptors for read in ended),
            reads=len(ended),
            seconds=self._seconds,
            hidden_s=self._hidden_s,
            sealed=self._vouched,
        )

    def post(
        self, first_index: int, block_ids: Sequence[BlockId], seal: Seal | None = None
    ) -> None:
        """Read the owner's `block_ids` into the blocks of the sequence from `first_index` on.
        `seal` comes with the last of them.
        """
        skip = max(0, len(self.cached) - first_index)
        remote = list(block_ids[skip:])
        if not remote:
            return
        start = first_index + skip - len(self.cached)
        local = self.fresh[start : start + len(remote)]
        self._remote.update(zip(range(start, start + len(remote)), remote, strict=True))
        sealed = self._sealed(seal)
        reads = self._room.start_reads(self._connection, remote, local, sealed)
        nbytes = len(local) * self._room.arena.layout.block_bytes
        self._shares.append(self._room.metrics.traffic.begin(nbytes))
        for read in reads:
            self.reads.append(read)
            if self._running == 0:
                self._since_s = time.monotonic()
            self._running += 1
            self._last = read if sealed is not None else None
            read.add_done_callback(self._read_ended)

    def _sealed(self, seal: Seal | None) -> Sealed | None:
        """Whether the seal is asked: not where the owner is to send checksums, nor of an owner
        whose ranks are read each for itself.
        """
        config = self._room.config
        alone = len(self._connection.shapes) == 1 and config.verify == "off"
        if seal is None or not alone or not config.seals:
            return None
        return Sealed(seal, tuple(read for read in self.reads if not read.done()))

    def _read_ended(self, read: "asyncio.Future[ReadStats]") -> None:
        self._running -= 1
        if self._running == 0:
            # Of a seal read while others still wrote, nothing follows for what they bring.
            last = read is self._last and read.exception() is None
            self._vouched = last and read.result().sealed
            self._seconds += time.monotonic() - self._since_s
            self._ask_if_all_here()
            self._end_shares()
        self._lease.changed.set()

    def _end_shares(self) -> None:
        for share in self._shares:
            self._room.metrics.traffic.end(share)
        self._shares.clear()

    def all_posted(self) -> None:
        """Nothing is left to read: the closing question is asked as soon as the last read has
        ended well, before any task is woken for it; or after that, see `_close_sealed`.
        """
        self._all_posted = True
        self._ask_if_all_here()

    def _ask_if_all_here(self) -> None:
        if not self._all_posted or self._running or self._lease.asked or self._lease.failure:
            return
        if all(read.exception() is None for read in self.reads):
            self._verified = self._to_verify()
            if self._vouched:
                self._close_sealed()
            else:
                self._connection.ask_close(self._lease, self._verified_blocks())

    def _close_sealed(self) -> None:
        """Whoever waits for the blocks goes before the question, of which only the owner needs the
        answer: to write and send it takes a quarter of the time from the read's end until then.
        """
        self._lease.asked = True
        self._lease.sealed()
        asyncio.get_running_loop().call_soon(self._connection.ask_close, self._lease, ())

    def _verified_blocks(self) -> tuple[BlockId, ...]:
        return tuple(self._remote[place] for place in self._verified)

    def note_final(self) -> None:
        """The owner has announced its last: what was read until now was hidden behind its work."""
        running_s = time.monotonic() - self._since_s if self._running else 0.0
        self._hidden_s = self._seconds + running_s

    def raise_failed_read(self) -> None:
        """Raise the first failure of a read that has ended; later pulls make contact anew."""
        for read in self.reads:
            error = read.exception() if read.done() else None
            if error is not None:
                self._connection.retire()
                raise error

    def give_up(self) -> None:
        """Nobody will use what the reads bring; those that have not begun never do."""
        for read in self.reads:
            give_up(read)

    async def settle(self) -> None:
        """Wait for the posted reads; the end of the lease, or of patience, ends the waiting."""
        since_s = asyncio.get_running_loop().time()
        while True:
            self._lease.changed.clear()
            self.raise_failed_read()
            self._lease.raise_failure()
            if self.all_here:
                return
            give_up_s = since_s + self._patience_s()
            try:
                async with asyncio.timeout_at(give_up_s):
                    await self._lease.changed.wait()
            except TimeoutError:
                self.raise_failed_read()  # the last may have failed just now, and has no share left
                if self.all_here or since_s + self._patience_s() > give_up_s:
                    continue  # the last has ended just now, or more came beside it
                raise TransferFailed(
                    "a KV read did not end in time", cause=TransferCause.READ_SLOW
                ) from None

    def _patience_s(self) -> float:
        """For reads under way."""
        beside = max(share.beside for share in self._shares)
        return patience_s(self._room.config.read_timeout_s, beside)

    async def confirm(self) -> None:
        """Hear the closing question's answer, after `settle`; on return the blocks are usable, one
        running reference each.
        """
        self.all_posted()
        self.stats = self._sum_up()
        summed = len(self._verified) * self._room.arena.layout.block_bytes
        answer = self._connection.closed_lease(
            self._lease,
            self._verified_blocks(),
            patience_s(self._room.config.read_timeout_s, summed),
        )
        if self._verified:
            mine, closed = await asyncio.gather(
                checksum_blocks(self._room.arena, [self.fresh[i] for i in self._verified]), answer
            )
        else:
            mine, closed = (), await answer
        if closed.outcome is not LeaseOutcome.HELD:
            self._lease.raise_failure()
            expired = closed.outcome is LeaseOutcome.EXPIRED
            raise TransferFailed(
                f"the KV owner did not confirm the blocks: {closed.outcome.name}",
                cause=TransferCause.EXPIRED if expired else TransferCause.NOT_CONFIRMED,
            )
        if mine:
            self._compare(mine, closed.checksums)
        self._room.pool.received(self.fresh)

    def _compare(self, mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
        """Raise unless the checksums of this worker's heads are the owner's."""
        shards = self._connection.shapes
        heads = sorted({head for shard in shards for head in shard.layout.heads})
        wanted = len(self._verified) * len(heads)
        if len(theirs) != wanted:
            raise TransferFailed(
                f"the KV owner's answer has {len(theirs)} of {wanted} checksums: the first answer "
                "was lost and it keeps none, or it does not sum each head of all its ranks",
                cause=TransferCause.NOT_CONFIRMED,
            )
        if mine != checksums_of(theirs, heads, self._room.arena.layout.heads):
            raise TransferFailed(
                "the KV that arrived is not the owner's: its checksum differs",
                cause=TransferCause.CHECKSUM,
            )

    def _to_verify(self) -> list[int]:
        """Blocks to compare, by place in `fresh`."""
        picked = pick_blocks(self._room.config.verify, len(self._remote), self._lease.lease_id)
        places = sorted(self._remote) if picked else []
        return [places[i] for i in picked]
