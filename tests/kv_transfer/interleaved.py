"""An owner and its readers as test_interleavings.py drives them: real halves, watched.

What a block holds is a `Kv`, not bytes. Of a worker only the engine and the roles' loops are not
here: Prefill and Decoding do what those do with a sequence's blocks and its lease, in the same
order.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from core.blocks import chain_hashes, root_hash
from core.clock import Clock
from core.errors import TransferCause, TransferFailed
from core.ids import (
    BlockHash,
    BlockId,
    Incarnation,
    LeaseId,
    ModelId,
    RequestId,
    SequenceId,
    ShardId,
    WorkerId,
)
from core.kv import KvLayout
from core.sampling import SamplingParams
from engine.arena import Arena
from engine.pool import BlockPool, BlockState
from engine.sequence import Sequence as EngineSequence
from engine.types import Sampled
from kv_transfer.config import TransferConfig
from kv_transfer.leases import Lease, LeaseListener, LeaseTable
from kv_transfer.messages import LeaseOutcome, Memory, PeerHello, Shard
from kv_transfer.owner import Owner
from kv_transfer.plan import ReadPlan
from kv_transfer.reader import Reader
from kv_transfer.server import PeerService
from kv_transfer.transport import ReadStats
from kv_transfer.transports import Transports
from tests.kv_transfer.cranked import Steps

MODEL = ModelId("m")
ROOT = root_hash(MODEL)
SIZE = 2
LAYOUT = KvLayout(block_size=SIZE, num_kv_heads=1, num_layers=1, head_dim=1, dtype="uint8")
OWNER_BLOCKS, READER_BLOCKS = 9, 8
RECEIVED_STEPS = 4
LEASE_S, READ_TIMEOUT_S, CONNECT_TIMEOUT_S = 6.0, 4.0, 3.0


# -- what blocks hold ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kv:
    """KV of all `tokens`, the last of them in this block; `writer` is the allocation it is of."""

    writer: int
    tokens: tuple[int, ...] = ()


@cache
def hash_of(tokens: tuple[int, ...]) -> BlockHash:
    """Of the last block of `tokens`, which are whole blocks."""
    return chain_hashes(tokens, SIZE, ROOT)[-1] if tokens else ROOT


class WatchedPool(BlockPool):
    """Knows what each block holds. A block taken anew holds nothing of what it held."""

    def __init__(self, num_blocks: int, writers: Iterator[int]) -> None:
        super().__init__(num_blocks)
        self._writers = writers
        self.kv = [Kv(next(writers)) for _ in range(num_blocks)]

    def allocate(self, count: int) -> list[BlockId] | None:
        return self._wipe(super().allocate(count))

    def reserve(self, count: int) -> list[BlockId] | None:
        return self._wipe(super().reserve(count))

    def _wipe(self, taken: list[BlockId] | None) -> list[BlockId] | None:
        for block_id in taken or ():
            self.kv[block_id] = Kv(next(self._writers))
        return taken

    def write(self, block_id: BlockId, tokens: tuple[int, ...]) -> None:
        """The engine computes KV into a block of a running sequence."""
        self.kv[block_id] = Kv(self.kv[block_id].writer, tokens)

    def state(self, block_id: BlockId) -> BlockState:
        return self._state[block_id]

    def check_running(self, holders: Sequence[Sequence[BlockId]]) -> None:
        """Running references are those of `holders`, no more and no fewer."""
        expected = Counter(block_id for blocks in holders for block_id in blocks)
        actual = Counter({BlockId(i): refs for i, refs in enumerate(self._running) if refs})
        assert actual == expected, f"running references {actual}, of holders {expected}"

    def check_published(self) -> None:
        """No hash leads to KV of other tokens."""
        for block_hash in self.hashes():
            (block_id,) = self.lookup([block_hash])
            tokens = self.kv[block_id].tokens
            assert len(tokens) % SIZE == 0, f"block {block_id} is published, but partial"
            assert hash_of(tokens) == block_hash, f"block {block_id} holds other tokens: {tokens}"


@dataclass(slots=True)
class Promise:
    """A lease, and what its blocks held when they were announced."""

    lease: Lease
    kv: list[Kv] = field(default_factory=list)


class WatchedTable(LeaseTable):
    """Remembers what was promised under each lease, and to whom it said HELD."""

    def __init__(self, pool: WatchedPool, clock: Clock, lease_s: float) -> None:
        super().__init__(pool, clock, lease_s)
        self._kv = pool.kv
        self.promises: dict[LeaseId, Promise] = {}
        self.confirmed: dict[LeaseId, str] = {}

    def open(self, sequence_id: SequenceId, listener: LeaseListener | None = None) -> Lease:
        lease = super().open(sequence_id, listener)
        self.promises[lease.lease_id] = Promise(lease)
        return lease

    def extend(self, lease: Lease, block_ids: Sequence[BlockId]) -> None:
        if self.get(lease.lease_id) is lease:
            self.promises[lease.lease_id].kv += [self._kv[b] for b in block_ids]
        super().extend(lease, block_ids)

    def close(self, lease_id: LeaseId, reader: str) -> LeaseOutcome:
        outcome = super().close(lease_id, reader)
        if outcome is LeaseOutcome.HELD:
            self.confirmed.setdefault(lease_id, reader)
        return outcome

    def sweep(self) -> list[Lease]:
        expired = super().sweep()
        assert all(lease.tokens is not None for lease in expired), "expired before its end"
        return expired

    def check_promises(self) -> None:
        """What was announced under an open lease is what it was."""
        for lease in self.all():
            assert not lease.answer_ended, "nobody reads it, but it is held"
            held = [self._kv[block_id] for block_id in lease.blocks]
            assert held == self.promises[lease.lease_id].kv, f"lease {lease.lease_id} was broken"

    def check_counters(self) -> None:
        """Every lease is counted once."""
        c, still_open = self.counters, len(self.all())
        assert c.opened == c.closed + c.aborted + c.expired + still_open, c


# -- reads --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Read:
    """Pairs of the owner's and the reader's blocks, of which the first `copied` have arrived."""

    pairs: list[tuple[BlockId, BlockId]]
    future: "asyncio.Future[ReadStats]"
    at_step: int
    copied: int = 0


class ChosenTransport:
    """A Transport whose reads copy and end when told, from whoever owns the memory then."""

    name = "loopback"

    def __init__(
        self, arena: Arena, pool: WatchedPool, owner: Callable[[], WatchedPool], steps: Steps
    ) -> None:
        self._arena = arena
        self._steps = steps
        self._pool = pool
        self._owner = owner
        self.reads: list[Read] = []

    def memory(self) -> Memory:
        return memory_of(self._arena)

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        pass

    async def disconnect(self, peer: ShardId) -> None:
        pass

    async def failed(self) -> Exception:
        raise NotImplementedError

    async def close(self) -> None:
        pass

    def start_read(self, peer: ShardId, plan: ReadPlan) -> "asyncio.Future[ReadStats]":
        size = LAYOUT.block_bytes
        pairs = [
            (BlockId(remote // size + i), BlockId(local // size + i))
            for remote, local, nbytes in plan.rows.tolist()
            for i in range(nbytes // size)
        ]
        future: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        read = Read(pairs, future, self._steps.number)
        self.reads.append(read)
        return read.future

    def due(self, latency: int) -> list[Read]:
        """Those that last moved that many steps ago."""
        return [read for read in self.reads if read.at_step + latency <= self._steps.number]

    def move(self, read: Read) -> None:
        """The first half of it arrives, or the rest, with which it ends."""
        read.at_step = self._steps.number
        half, whole = len(read.pairs) // 2, len(read.pairs)
        upto = half if read.copied < half else whole
        for remote, local in read.pairs[read.copied : upto]:
            self._pool.kv[local] = self._owner().kv[remote]
        read.copied = upto
        if upto == whole:
            self.reads.remove(read)
            nbytes = whole * LAYOUT.block_bytes
            read.future.set_result(ReadStats(nbytes=nbytes, descriptors=1, seconds=0.0))

    def fail(self, read: Read) -> None:
        """No more of it comes."""
        self.reads.remove(read)
        read.future.set_exception(TransferFailed("torn", cause=TransferCause.READ_FAILED))

    def check_targets(self) -> None:
        """Nobody else has a block that is the target of a read."""
        for read in self.reads:
            for _, local in read.pairs:
                state = self._pool.state(local)
                assert state in (BlockState.RECEIVING, BlockState.QUARANTINED), (
                    f"block {local} is {state.name} under a read"
                )


def memory_of(arena: Arena) -> Memory:
    return Memory(
        transport=ChosenTransport.name, metadata=b"", address=0, nbytes=arena.nbytes, device="cpu"
    )


# -- the owner ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the halves are made of; a test that breaks something gives another class."""

    owner_pool: type[WatchedPool] = WatchedPool
    reader_pool: type[WatchedPool] = WatchedPool
    table: type[WatchedTable] = WatchedTable
    owner: type[Owner] = Owner
    reader: type[Reader] = Reader


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
        self.table = parts.table(self.pool, clock, LEASE_S)
        self.owner = parts.owner(self.table, lambda: None)
        arena = Arena(LAYOUT, OWNER_BLOCKS)
        self.hello = hello_of("owner", life, arena)
        self.service = PeerService(self.owner, lambda: self.hello, arena)
        self.prefills: list[Prefill] = []
        self.decodings: list[Decoding] = []
        self.others: list[list[BlockId]] = []

    def check(self) -> None:
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
        self.lease = self._life.owner.open(self.sequence.sequence_id, self)
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
        owner: Callable[[], WatchedPool],
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
