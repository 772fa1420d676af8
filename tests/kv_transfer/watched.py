"""Pool, leases and transport that know what each block holds: a `Kv` in place of bytes."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from core.blocks import chain_hashes, root_hash
from core.clock import Clock
from core.errors import TransferCause, TransferFailed
from core.ids import BlockHash, BlockId, LeaseId, ModelId, SequenceId, ShardId
from core.kv import KvLayout
from engine.arena import Arena
from engine.pool import BlockPool, BlockState
from kv_transfer.leases import Lease, LeaseListener, LeaseTable
from kv_transfer.messages import LeaseOutcome, Memory
from kv_transfer.plan import ReadPlan
from kv_transfer.seals import Seals
from kv_transfer.transport import ReadStats, Sealed
from tests.kv_transfer.cranked import Steps

MODEL = ModelId("m")
ROOT = root_hash(MODEL)
SIZE = 2
LAYOUT = KvLayout(block_size=SIZE, num_kv_heads=1, num_layers=1, head_dim=1, dtype="uint8")


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

    def __init__(self, pool: WatchedPool, clock: Clock, lease_s: float, seals: Seals) -> None:
        super().__init__(pool, clock, lease_s, seals)
        self.seals = seals
        self._kv = pool.kv
        self.promises: dict[LeaseId, Promise] = {}
        self.confirmed: dict[LeaseId, str] = {}
        self.sealed: dict[int, LeaseId] = {}

    def open(
        self,
        sequence_id: SequenceId,
        listener: LeaseListener | None = None,
        *,
        moves: bool = False,
    ) -> Lease:
        lease = super().open(sequence_id, listener, moves=moves)
        self.promises[lease.lease_id] = Promise(lease)
        return lease

    def extend(self, lease: Lease, block_ids: Sequence[BlockId]) -> None:
        if self.get(lease.lease_id) is lease:
            self.promises[lease.lease_id].kv += [self._kv[b] for b in block_ids]
        super().extend(lease, block_ids)

    def finish(self, lease: Lease, tokens: tuple[int, ...], *, answer_ended: bool) -> None:
        super().finish(lease, tokens, answer_ended=answer_ended)
        if lease.seal is not None:
            self.sealed[lease.seal.word] = lease.lease_id

    def close(
        self,
        lease_id: LeaseId,
        reader: str,
        tell: Callable[[LeaseOutcome], None] = lambda _: None,
    ) -> LeaseOutcome:
        outcome = super().close(lease_id, reader, tell)
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
        assert c.opened == c.ended.total() + still_open, c
        assert sum(c.by_reader.values(), Counter()) == c.ended, c
        assert np.count_nonzero(self.seals.words) == sum(
            lease.seal is not None for lease in self.all()
        )


# -- reads --------------------------------------------------------------------------------------


@dataclass(slots=True)
class Read:
    """Pairs of the owner's and the reader's blocks, of which the first `copied` have arrived."""

    pairs: list[tuple[BlockId, BlockId]]
    future: "asyncio.Future[ReadStats]"
    sealed: Sealed | None
    at_step: int
    copied: int = 0


class ChosenTransport:
    """A Transport whose reads copy and end when told, from whoever owns the memory then. Of seals
    it looks at every other one, so that the closing question decides as often.
    """

    name = "loopback"

    def __init__(
        self,
        arena: Arena,
        pool: WatchedPool,
        owner: Callable[[], tuple[WatchedPool, Seals]],
        steps: Steps,
    ) -> None:
        self._arena = arena
        self._steps = steps
        self._pool = pool
        self._owner = owner
        self.reads: list[Read] = []
        self.sees_seals = True
        self._seals_seen = 0
        self.found: set[int] = set()
        """Words of seals that it found."""

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

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        size = LAYOUT.block_bytes
        pairs = [
            (BlockId(remote // size + i), BlockId(local // size + i))
            for remote, local, nbytes in plan.rows.tolist()
            for i in range(nbytes // size)
        ]
        future: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        read = Read(pairs, future, sealed, self._steps.number)
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
            self._pool.kv[local] = self._owner()[0].kv[remote]
        read.copied = upto
        if upto == whole:
            self.reads.remove(read)
            nbytes = whole * LAYOUT.block_bytes
            sealed = self._is_whole(read.sealed)
            read.future.set_result(
                ReadStats(nbytes=nbytes, descriptors=1, seconds=0.0, sealed=sealed)
            )

    def _is_whole(self, sealed: Sealed | None) -> bool:
        if not self.sees_seals or sealed is None or not all(r.done() for r in sealed.after):
            return False
        self._seals_seen += 1
        whole = self._seals_seen % 2 == 1 and self._owner()[1].is_whole(sealed.seal)
        if whole:
            self.found.add(sealed.seal.word)
        return whole

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
