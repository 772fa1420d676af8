"""An owner and its readers as test_interleavings.py drives them: real halves, watched.

Of a worker only the engine and the roles' loops are not here: Prefill and Decoding do what those do
with a sequence's blocks and its lease, in the same order.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from core.clock import Clock
from core.ids import BlockHash, BlockId, Incarnation, RequestId, SequenceId, WorkerId
from core.sampling import SamplingParams
from engine.arena import Arena
from engine.sequence import Sequence as EngineSequence
from engine.types import Sampled
from kv_transfer.bound import BoundLease
from kv_transfer.config import TransferConfig
from kv_transfer.landing import Reserved
from kv_transfer.leases import Lease
from kv_transfer.messages import Abort, Closed, FromOwner, LeaseOutcome, PeerHello, Renewed, Shard
from kv_transfer.owner import Owner
from kv_transfer.reader import Reader
from kv_transfer.seals import Seals
from kv_transfer.server import PeerDoor
from kv_transfer.transports import Transports
from tests.kv_transfer.cranked import Steps
from tests.kv_transfer.watched import (
    LAYOUT,
    MODEL,
    ROOT,
    SIZE,
    ChosenTransport,
    WatchedPool,
    WatchedTable,
    memory_of,
)

OWNER_BLOCKS, READER_BLOCKS = 9, 8
SEALS = 2
RECEIVED_STEPS = 4
LEASE_S, READ_TIMEOUT_S, CONNECT_TIMEOUT_S = 6.0, 4.0, 3.0


# -- the owner ----------------------------------------------------------------------------------


class WatchedReader(Reader):
    """Tells how many pulls wait for memory."""

    waiting = 0

    async def reserve(
        self, hashes: Sequence[BlockHash], num_blocks: int, lease: BoundLease
    ) -> Reserved:
        self.waiting += 1
        try:
            return await super().reserve(hashes, num_blocks, lease)
        finally:
            self.waiting -= 1


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the halves are made of; a test that breaks something gives another class."""

    owner_pool: type[WatchedPool] = WatchedPool
    reader_pool: type[WatchedPool] = WatchedPool
    table: type[WatchedTable] = WatchedTable
    seals: type[Seals] = Seals
    owner: type[Owner] = Owner
    reader: type[WatchedReader] = WatchedReader


def hello_of(name: str, life: int, arena: Arena) -> PeerHello:
    return PeerHello(
        worker_id=WorkerId(name),
        incarnation=Incarnation(f"{name}.{life}"),
        model_id=MODEL,
        shards=(Shard(layout=LAYOUT, memories=(memory_of(arena),)),),
    )


def sequence_of(number: int, context: tuple[int, ...]) -> EngineSequence:
    return EngineSequence(
        sequence_id=SequenceId(RequestId(f"r{number}")),
        context=context,
        output_position=0,
        sampling=SamplingParams(max_tokens=1_000),
        root=ROOT,
        deadline_at_s=float("inf"),
        arrived_at_s=0.0,
    )


def feed(pool: WatchedPool, sequence: EngineSequence, num_tokens: int) -> None:
    """The engine computes KV of the next tokens, the runner publishes what is full."""
    end = sequence.computed + num_tokens
    for index in range(sequence.computed // SIZE, LAYOUT.num_blocks(end)):
        pool.write(sequence.blocks[index], tuple(sequence.tokens[: min(end, (index + 1) * SIZE)]))
    sequence.computed = end
    sequence.publish(pool, SIZE)


class OwnerLife:
    """One incarnation of the owner, and what runs there."""

    def __init__(self, parts: Parts, clock: Clock, life: int, writers: Iterator[int]) -> None:
        self.pool = parts.owner_pool(OWNER_BLOCKS, writers)
        self.seals = parts.seals(SEALS)
        self.table = parts.table(self.pool, clock, LEASE_S, self.seals)
        self.owner = parts.owner(self.table, lambda: None)
        arena = Arena(LAYOUT, OWNER_BLOCKS)
        self.hello = hello_of("owner", life, arena)
        self.service = PeerDoor(self.owner, lambda: self.hello, arena)
        self.prefills: list[Prefill] = []
        self.decodings: list[Decoding] = []
        self.others: list[list[BlockId]] = []
        self.said_to_stranger: list[FromOwner] = []
        hello = hello_of("stranger", 0, arena)
        self.stranger = self.owner.attach(hello, self.said_to_stranger.append)
        """A reader to whom no lease is bound, whatever it says."""

    def check(self) -> None:
        """What holds at any time."""
        for said in self.said_to_stranger:
            refused = isinstance(said, Closed) and said.outcome is LeaseOutcome.UNKNOWN
            assert refused or isinstance(said, Abort | Renewed), said
        self.said_to_stranger.clear()
        self.pool.check()
        self.pool.check_published()
        self.pool.check_running(
            [
                *(prefill.sequence.blocks for prefill in self.prefills),
                *(decoding.sequence.blocks for decoding in self.decodings),
                *self.others,
            ]
        )
        self.table.check()
        self.table.check_promises()
        self.table.check_counters()

    def check_over(self) -> None:
        """Nothing runs and all leases have ended."""
        self.check()
        self.pool.check_idle()
        counts = self.pool.counts()
        assert counts.held == 0, counts
        assert not self.table.all()


class Prefill:
    """A prefill leg: what prefill_worker.role and the runner do with its blocks."""

    def __init__(self, life: OwnerLife, sequence: EngineSequence) -> None:
        self._life = life
        self.sequence = sequence
        self.lease = life.owner.open(sequence.sequence_id)
        life.prefills.append(self)

    def compute(self, num_tokens: int, *, ends: bool) -> None:
        """Start if there is room, run a chunk, announce what it filled; the last one finishes."""
        sequence, owner = self.sequence, self._life.owner
        if not sequence.blocks and not self._admit():
            return
        feed(self._life.pool, sequence, min(num_tokens, sequence.pending_tokens))
        if sequence.pending_tokens:
            self._announce()
            return
        rest = sequence.blocks[len(self.lease.blocks) :]
        owner.finish(self.lease, rest, (next_token(sequence),), ended=ends)
        self._leave()

    def _admit(self) -> bool:
        sequence, pool = self.sequence, self._life.pool
        full = (len(sequence.tokens) - 1) // SIZE
        cached = pool.lookup(sequence.block_hashes(full, SIZE))
        missing = LAYOUT.num_blocks(len(sequence.tokens)) - len(cached)
        if missing > pool.available_beside(cached):
            return False
        pool.acquire(cached)
        sequence.blocks = [*cached, *(pool.allocate(missing) or [])]
        sequence.published = len(cached)
        sequence.computed = len(cached) * SIZE
        self._announce()
        return True

    def _announce(self) -> None:
        fresh = self.sequence.blocks[len(self.lease.blocks) : self.sequence.published]
        if fresh:
            self._life.owner.announce(self.lease, fresh)

    def cancel(self) -> None:
        self._leave()
        self._life.owner.abort(self.lease.lease_id, "cancelled")

    def fail(self) -> None:
        """A step failed: what it wrote is in doubt."""
        self._life.owner.abort(self.lease.lease_id, "a step failed")
        self._life.pool.unpublish(self.sequence.blocks)
        self._leave()

    def preempt(self) -> None:
        """Its blocks go back; it will start again, from what the lease keeps cached."""
        self._life.pool.release(self.sequence.blocks)
        self.sequence.blocks = []
        self.sequence.computed = self.sequence.published = 0

    def _leave(self) -> None:
        self._life.prefills.remove(self)
        self._life.pool.release(self.sequence.blocks)


def next_token(sequence: EngineSequence) -> int:
    return len(sequence.tokens) % 2


class Decoding:
    """A running sequence that may be offered: what decode_worker.migration does with its lease."""

    def __init__(self, life: OwnerLife, sequence: EngineSequence) -> None:
        self._life = life
        self.sequence = sequence
        self.lease: Lease | None = None
        self.held = False
        self._ready = False
        sequence.blocks = life.pool.allocate(LAYOUT.num_blocks(sequence.context_tokens)) or []
        feed(life.pool, sequence, sequence.context_tokens)
        sequence.append(Sampled(token=next_token(sequence)))
        life.decodings.append(self)

    def decode(self, token: int) -> None:
        """One step, if it is not held and has room; then announce or stop for the rest."""
        sequence = self.sequence
        if self.held or not self._grow():
            return
        feed(self._life.pool, sequence, 1)
        sequence.append(Sampled(token=token))
        if self.lease is not None and self._ready:
            self._stop(self.lease)
        elif self.lease is not None:
            self._announce(self.lease)

    def _grow(self) -> bool:
        missing = LAYOUT.num_blocks(len(self.sequence.tokens)) - len(self.sequence.blocks)
        fresh = self._life.pool.allocate(missing)
        self.sequence.blocks += fresh or []
        return fresh is not None

    def offer(self) -> Lease:
        """Open a lease; an older offer that nobody has taken yet is replaced."""
        self.drop()
        self.lease = self._life.owner.open(self.sequence.sequence_id, self, moves=True)
        self._ready = False
        self._announce(self.lease)
        return self.lease

    def _announce(self, lease: Lease) -> None:
        fresh = self.sequence.blocks[len(lease.blocks) : self.sequence.published]
        if fresh:
            self._life.owner.announce(lease, fresh)

    def _stop(self, lease: Lease) -> None:
        self.held = True
        sequence = self.sequence
        rest = sequence.blocks[len(lease.blocks) : LAYOUT.num_blocks(sequence.computed)]
        tokens = tuple(sequence.tokens[sequence.context_tokens :])
        self._life.owner.finish(lease, rest, tokens, ended=False)

    def on_ready(self, lease: Lease) -> None:
        assert lease is self.lease
        self._ready = True

    def on_ended(self, lease: Lease, outcome: LeaseOutcome) -> None:
        assert lease is self.lease, "said once"
        self.lease = None
        self.held = False
        if outcome is LeaseOutcome.HELD:
            self._leave()

    def drop(self) -> None:
        """End the offer; it runs on here."""
        if self.lease is not None:
            self._life.owner.abort(self.lease.lease_id, "dropped")

    def end(self) -> None:
        """Its answer ends here, or it is preempted."""
        self.drop()
        self._leave()

    def _leave(self) -> None:
        self._life.decodings.remove(self)
        self._life.pool.release(self.sequence.blocks)


# -- a reader -----------------------------------------------------------------------------------


class ReaderLife:
    """A reader and what it holds. `host` keeps it entered until `stop`."""

    def __init__(
        self,
        name: str,
        parts: Parts,
        writers: Iterator[int],
        owner: Callable[[], tuple[WatchedPool, Seals]],
        *,
        steps: Steps,
        headroom: int,
    ) -> None:
        self.name = name
        self.pool = parts.reader_pool(READER_BLOCKS, writers)
        arena = Arena(LAYOUT, READER_BLOCKS)
        self.transport = ChosenTransport(arena, self.pool, owner, steps)
        hello = hello_of(name, 0, arena)
        self.reader = parts.reader(
            pool=self.pool,
            arena=arena,
            transports=Transports([self.transport]),
            hello=lambda: hello,
            config=TransferConfig(
                lease_s=LEASE_S,
                read_timeout_s=READ_TIMEOUT_S,
                connect_timeout_s=CONNECT_TIMEOUT_S,
            ),
            headroom=lambda: headroom,
        )
        self.received: list[Received] = []
        self.others: list[list[BlockId]] = []
        self.stop = asyncio.Event()

    async def host(self) -> None:
        async with self.reader:
            await self.stop.wait()

    def use(self, received: "Received") -> None:
        """A step of a sequence that runs here: it is published, and ends after a few of them."""
        received.steps += 1
        received.publish()
        if received.steps > RECEIVED_STEPS:
            self.release(received)

    def release(self, received: "Received") -> None:
        self.received.remove(received)
        self.pool.release(received.sequence.blocks)
        self.reader.space_freed()

    def check(self, *, pulling: bool, settled: bool) -> None:
        """While nothing is pulled the references are known, and nothing is on its way."""
        self.pool.check()
        self.pool.check_published()
        self.transport.check_targets()
        for received in self.received:
            received.check()
        if pulling:
            return
        counts = self.pool.counts()
        assert counts.receiving == 0, counts
        self.pool.check_running([*(r.sequence.blocks for r in self.received), *self.others])
        if settled and not self.transport.reads:
            assert counts.quarantined == 0, counts


class Received:
    """A sequence whose blocks have come here, in use until it is released."""

    def __init__(self, pool: WatchedPool, sequence: EngineSequence) -> None:
        self._pool = pool
        self.sequence = sequence
        self.steps = 0
        self._note()

    def publish(self) -> None:
        """What a decode worker does when it starts the sequence."""
        self.sequence.publish(self._pool, SIZE)
        self._note()

    def _note(self) -> None:
        self._kv = [self._pool.kv[block_id] for block_id in self.sequence.blocks]

    def check(self) -> None:
        """Nothing has been written into its blocks."""
        assert self._kv == [self._pool.kv[block_id] for block_id in self.sequence.blocks]
