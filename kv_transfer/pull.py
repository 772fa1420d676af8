"""What a hand-off says and does, from the first announcement to the closing question.

A pull follows a lease of a prefill, or of a running sequence; a fetch takes cached blocks.

    prefill   announcements may come late, twice or out of order; memory for the whole context is
              reserved at the first one
    running   memory grows with the announcements, and never waits: without it the move is off.
              When all that was announced is here, Ready asks the owner to stop for the rest
              (Llumnix section 4.2: staged copy; PRE-ALLOC is the reservation, ACK is Bind, COMMIT
              is HELD, ABORT is anything else)
    cached    all at once
"""

import asyncio
from collections.abc import Sequence
from contextvars import copy_context
from functools import partial

from core.errors import BatonError, TransferCause, TransferFailed
from core.ids import BlockHash, BlockId, SequenceId
from kv_transfer.bound import BoundLease
from kv_transfer.client import PeerConnection
from kv_transfer.landing import Landing, Reserved, Room
from kv_transfer.messages import Announce, Fetched


class Pulling:
    """One pull, bound to its lease."""

    def __init__(
        self,
        room: Room,
        connection: PeerConnection,
        lease: BoundLease,
        *,
        sequence_id: SequenceId,
        hashes: Sequence[BlockHash],
        context_tokens: int,
        live: bool,
    ) -> None:
        self._room = room
        self._connection = connection
        self._lease = lease
        self._sequence_id = sequence_id
        self._hashes = hashes
        self._context_tokens = context_tokens
        self._live = live
        self._landing: Landing | None = None
        self._final: Announce | None = None
        self._announced: set[int] = set()
        self._first_gap = 0
        self._said_ready = False
        self._waits_since_s: float | None = None
        """For what was asked for, or for what is missing before later blocks."""
        self._waits_for_room = False
        self._failure: BatonError | None = None

    async def run(self) -> tuple[Announce, Landing]:
        """Read everything and ask; answers the final announcement and usable blocks, or raises."""
        usable = False
        # what happens in the stream's callback belongs to this pull all the same
        self._lease.on_announce = partial(copy_context().run, self._heard)
        try:
            final = await self._follow()
            if final.ended:
                return final, self._nothing()
            landing = self._landing or await self._make_room(self._num_blocks(final))
            await landing.settle()
            await landing.confirm()
            usable = True
            return final, landing
        finally:
            self._lease.on_announce = None
            if not usable and self._landing is not None:
                self._room.give_back(self._landing)

    async def _follow(self) -> Announce:
        """Post a read per announcement until nothing is missing; answers the final one."""
        while True:
            self._lease.changed.clear()
            if self._failure is not None:
                raise self._failure
            while not self._take_all():
                first = self._lease.inbox[0]
                await self._make_room(first.first_index + len(first.block_ids))
            if self._final is not None and self._final.ended:
                return self._final
            if self._landing is not None:
                self._landing.raise_failed_read()
            if self._final is not None and self._complete:
                return self._final
            self._lease.raise_failure()
            self._ask_for_rest()
            await self._hear()

    def _heard(self) -> None:
        """An announcement came: its reads are posted before any task is woken for it."""
        if self._failure is None and not self._waits_for_room:
            try:
                self._take_all()
            except BatonError as error:
                self._failure = error

    def _take_all(self) -> bool:
        """Do what was announced; False: the first announcement left needs memory first."""
        inbox = self._lease.inbox
        while inbox and not (self._final is not None and self._final.ended):
            if not self._take(inbox[0]):
                return False
            inbox.popleft()
        return True

    def _take(self, announce: Announce) -> bool:
        self._check(announce)
        landing = self._landing
        if announce.block_ids and not announce.ended:
            landing = self._land(announce.first_index + len(announce.block_ids))
            if landing is None:
                return False
        if announce.final and self._final is None:
            self._final = announce
            if landing is not None:
                landing.note_final()
        if landing is not None and not announce.ended:
            self._post(announce, landing)
        return True

    def _check(self, announce: Announce) -> None:
        """Raise where it is not of this sequence, or its end has not as many tokens as it must."""
        wrong = ""
        if announce.sequence_id != self._sequence_id:
            wrong = "announced blocks of another sequence"
        elif announce.final and not (announce.tokens if self._live else len(announce.tokens) == 1):
            wrong = f"said that {len(announce.tokens)} tokens follow"
        if wrong:
            raise TransferFailed(f"the KV owner {wrong}", cause=TransferCause.OTHER_PROTOCOL)

    def _post(self, announce: Announce, landing: Landing) -> None:
        news = self._news(announce, len(landing.blocks))
        while self._first_gap in self._announced:
            self._first_gap += 1
        final = self._final if self._complete else None
        seal = None if final is None else final.seal
        for number, (start, block_ids) in enumerate(news, 1):
            landing.post(start, block_ids, seal if number == len(news) else None)
        if final is not None:
            landing.all_posted()

    @property
    def _complete(self) -> bool:
        """All blocks of the sequence were announced, and their reads posted."""
        final = self._final
        return final is not None and self._first_gap >= self._num_blocks(final)

    def _news(self, announce: Announce, limit: int) -> list[tuple[int, list[BlockId]]]:
        """What an announcement says for the first time, as runs of consecutive blocks."""
        runs: list[tuple[int, list[BlockId]]] = []
        for index, block_id in enumerate(announce.block_ids, announce.first_index):
            if index in self._announced or index >= limit:
                continue
            self._announced.add(index)
            if runs and runs[-1][0] + len(runs[-1][1]) == index:
                runs[-1][1].append(block_id)
            else:
                runs.append((index, [block_id]))
        return runs

    def _land(self, num_blocks: int) -> Landing | None:
        """Where the blocks go: of a prefill all of them at once, of a running sequence at need.

        None: that has to be waited for.
        """
        if self._landing is None:
            if self._live:
                cached = self._room.pool.lookup(self._hashes)
                return self._land_in(self._at_once(cached, max(num_blocks, len(cached))))
            reserved = self._room.reserve_now(self._hashes, self._whole)
            return None if reserved is None else self._land_in(reserved)
        if self._live and num_blocks > len(self._landing.blocks):
            more = self._at_once([], num_blocks - len(self._landing.blocks))
            self._landing.fresh += more.fresh
        return self._landing

    async def _make_room(self, num_blocks: int) -> Landing:
        """As `_land`, and wait where that is needed."""
        landing = self._land(num_blocks)
        if landing is not None:
            return landing
        self._waits_for_room = True
        try:
            reserved = await self._room.reserve(self._hashes, self._whole, self._lease)
        finally:
            self._waits_for_room = False
        return self._land_in(reserved)

    def _land_in(self, reserved: Reserved) -> Landing:
        self._landing = Landing(self._room, self._connection, self._lease, reserved)
        return self._landing

    @property
    def _whole(self) -> int:
        """Blocks of the whole context."""
        return self._room.arena.layout.num_blocks(self._context_tokens)

    def _at_once(self, cached: list[BlockId], num_blocks: int) -> Reserved:
        reserved = self._room.try_reserve(cached, num_blocks)
        if reserved is None:
            raise TransferFailed(
                "no memory for a running sequence here", cause=TransferCause.NO_MEMORY
            )
        return reserved

    def _num_blocks(self, final: Announce) -> int:
        """Blocks of all tokens but the last, which is to be fed next."""
        positions = self._context_tokens + len(final.tokens) - 1
        return self._room.arena.layout.num_blocks(positions)

    def _ask_for_rest(self) -> None:
        here = self._landing is not None and self._landing.all_here
        if self._live and here and self._final is None and not self._said_ready:
            self._said_ready = True
            self._connection.send_ready(self._lease.lease_id)

    async def _hear(self) -> None:
        """Wait for news. After a silence, or when other news come but not what is waited for, ask
        again: a message may have been lost.
        """
        now_s = asyncio.get_running_loop().time()
        waits = self._said_ready or len(self._announced) > self._first_gap
        since_s = now_s if self._waits_since_s is None else self._waits_since_s
        self._waits_since_s = since_s if waits else None
        try:
            async with asyncio.timeout_at(
                (since_s if waits else now_s) + self._room.config.lease_s / 3
            ):
                await self._lease.changed.wait()
        except TimeoutError:
            self._said_ready, self._waits_since_s = False, None
            self._connection.bind_again(self._lease.lease_id, self._sequence_id, self._first_gap)

    def _nothing(self) -> Landing:
        return Landing(self._room, self._connection, self._lease, Reserved([], []))


class Fetching:
    """One fetch of a cached prefix."""

    def __init__(
        self,
        room: Room,
        connection: PeerConnection,
        sequence_id: SequenceId,
        hashes: Sequence[BlockHash],
    ) -> None:
        self._room = room
        self._connection = connection
        self._sequence_id = sequence_id
        self._hashes = hashes

    async def run(self) -> Landing:
        """Usable blocks, or raises; what is cached here is kept from eviction meanwhile."""
        cached = self._room.pool.lookup(self._hashes)
        self._room.pool.acquire(cached)
        try:
            async with self._connection.fetch(self._sequence_id, self._hashes, len(cached)) as (
                lease,
                fetched,
            ):
                return await self._read(lease, cached, fetched)
        finally:
            self._room.pool.release(cached)

    async def _read(self, lease: BoundLease, cached: list[BlockId], fetched: Fetched) -> Landing:
        num_blocks = len(cached) + len(fetched.block_ids)
        if num_blocks > len(self._hashes):
            raise TransferFailed(
                "the KV owner has more of a prefix than was asked for",
                cause=TransferCause.OTHER_PROTOCOL,
            )
        reserved = self._room.try_reserve(cached, num_blocks)
        if reserved is None:
            raise TransferFailed("no memory for a prefix here", cause=TransferCause.NO_MEMORY)
        landing = Landing(self._room, self._connection, lease, reserved)
        usable = False
        try:
            landing.post(len(cached), fetched.block_ids, fetched.seal)
            landing.all_posted()
            await landing.settle()
            await landing.confirm()
            usable = True
            return landing
        finally:
            if not usable:
                self._room.give_back(landing)
