"""The two halves of a hand-off in one process: a real stream, a loopback transport."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from core.blocks import chain_hashes, root_hash
from core.clock import FakeClock
from core.errors import TransferFailed
from core.ids import (
    BlockHash,
    BlockId,
    ModelId,
    RequestId,
    SequenceId,
    ShardId,
    WorkerId,
    new_incarnation,
)
from core.kv import KvLayout
from core.messages import Handoff, PrefixSource
from core.stream import address_of, listen
from engine.arena import Arena
from engine.pool import BlockPool
from kv_transfer.checksum import VerifyMode
from kv_transfer.config import TransferConfig
from kv_transfer.leases import Lease, LeaseListener, LeaseTable
from kv_transfer.loopback import LoopbackHub, LoopbackTransport
from kv_transfer.messages import FromOwner, FromReader, Memory, PeerHello, Shard
from kv_transfer.owner import Owner, Send
from kv_transfer.plan import ReadPlan
from kv_transfer.reader import FetchedPrefix, FetchRequest, Pulled, PullRequest, Reader
from kv_transfer.seals import Seals
from kv_transfer.server import serving_peers
from kv_transfer.transport import ReadStats, Sealed
from kv_transfer.transports import Transports
from tests.builders import WAIT_S, until

LAYOUT = KvLayout(block_size=4, num_kv_heads=2, num_layers=1, head_dim=2, dtype="uint8")
NUM_BLOCKS = 16
LEASE_S = 10.0
SEQUENCE = SequenceId(RequestId("r"))
LAST = (77,)


class HoldingTransport:
    """Loopback whose reads do not start until `let_go`: a slow or hanging network."""

    name = "loopback"

    def __init__(self, inner: LoopbackTransport) -> None:
        self._inner = inner
        self._held: list[tuple[ShardId, ReadPlan, Sealed | None, asyncio.Future[ReadStats]]] = []
        self.reads = 0
        self.holds = True

    @property
    def waiting(self) -> int:
        return len(self._held)

    def memory(self) -> Memory:
        return self._inner.memory()

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        await self._inner.connect(peer, memory)

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        self.reads += 1
        if not self.holds:
            return self._inner.start_read(peer, plan, sealed)
        future: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        self._held.append((peer, plan, sealed, future))
        return future

    async def disconnect(self, peer: ShardId) -> None:
        await self._inner.disconnect(peer)

    async def failed(self) -> Exception:
        return await self._inner.failed()

    async def close(self) -> None:
        await self._inner.close()

    def let_go(self, count: int | None = None) -> None:
        """Carry out the reads held so far, or the first `count` of them."""
        going, self._held = self._held[:count], self._held[len(self._held[:count]) :]
        for peer, plan, sealed, future in going:
            done = self._inner.start_read(peer, plan, sealed)
            error = done.exception()
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result())


class LossyOwner(Owner):
    """An owner whose messages in both directions pass through hands that may change them."""

    def __init__(self, table: LeaseTable) -> None:
        super().__init__(table, lambda: None)
        self.sent: list[FromOwner] = []
        self.heard: list[FromReader] = []
        self.says: Callable[[FromOwner], list[FromOwner]] = lambda message: [message]
        self.hears: Callable[[FromReader], list[FromReader]] = lambda message: [message]

    def attach(self, hello: PeerHello, send: Send) -> str:
        def say(message: FromOwner) -> None:
            self.sent.append(message)
            for each in self.says(message):
                send(each)

        return super().attach(hello, say)

    def handle(self, reader: str, message: FromReader) -> None:
        self.heard.append(message)
        for each in self.hears(message):
            super().handle(reader, each)


class Half:
    """What both sides have: a pool, an arena, a transport, an identity."""

    def __init__(
        self, name: str, hub: LoopbackHub, model: str = "m", layout: KvLayout = LAYOUT
    ) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.arena = Arena(layout, NUM_BLOCKS)
        self.seals = Seals()
        self.transport = HoldingTransport(LoopbackTransport(self.arena, hub, self.seals))
        self.transport.holds = False
        self.hello = PeerHello(
            worker_id=WorkerId(name),
            incarnation=new_incarnation(),
            model_id=ModelId(model),
            shards=(Shard(layout=layout, memories=(self.transport.memory(),)),),
        )


class OwnerHalf(Half):
    """Leases behind a real door; its clock moves only when told."""

    def __init__(self, hub: LoopbackHub, name: str = "owner", *, layout: KvLayout = LAYOUT) -> None:
        super().__init__(name, hub, layout=layout)
        self._hub = hub
        self.ranks: list[Arena] = []
        self.arena.data.random_(0, 256, generator=torch.Generator().manual_seed(0))
        self.clock = FakeClock()
        self.table = LeaseTable(self.pool, self.clock, LEASE_S, self.seals)
        self.owner = LossyOwner(self.table)
        self.listener = listen("127.0.0.1", 0)
        self.address = address_of(self.listener)
        self._door = AsyncExitStack()

    def split_in_two(self) -> None:
        """From the next stream on it is of two tensor-parallel ranks, with a head in each arena."""
        shards = []
        for rank in range(2):
            layout = replace(LAYOUT, num_kv_heads=1, tp_size=2, tp_rank=rank)
            arena = Arena(layout, NUM_BLOCKS)
            arena.data.copy_(self.arena.data[:, rank : rank + 1])
            memory = LoopbackTransport(arena, self._hub).memory()
            self.ranks.append(arena)
            shards.append(Shard(layout=layout, memories=(memory,)))
        self.hello = replace(self.hello, shards=tuple(shards))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Its door is open inside, until `stop`."""
        async with self._door:
            door = serving_peers(self.listener, self.owner, lambda: self.hello, self.arena)
            await self._door.enter_async_context(door)
            yield

    async def stop(self) -> None:
        """Break all streams and listen no more."""
        await self._door.aclose()

    def open(
        self, num_blocks: int, listener: LeaseListener | None = None, *, moves: bool = False
    ) -> tuple[Lease, list[BlockId]]:
        """A lease, and the blocks its prefill will announce."""
        return self.owner.open(SEQUENCE, listener, moves=moves), self.pool.allocate(
            num_blocks
        ) or []

    def whole(self, num_blocks: int) -> tuple[Lease, list[BlockId]]:
        """A lease whose prefill has ended."""
        lease, blocks = self.open(num_blocks)
        self.owner.finish(lease, blocks, LAST, ended=False)
        return lease, blocks

    def handoff(self, lease: Lease) -> Handoff:
        return Handoff(
            owner_id=self.hello.worker_id,
            owner_address=self.address,
            owner_incarnation=self.hello.incarnation,
            lease_id=lease.lease_id,
        )


def hashes_of(num_blocks: int) -> list[BlockHash]:
    """Of the first blocks of the one prompt these tests know."""
    return chain_hashes([7] * num_blocks, 1, root_hash(ModelId("m")))


def cache(pool: BlockPool, num_blocks: int) -> list[BlockId]:
    """Put the first blocks of that prompt into a pool's prefix cache."""
    blocks = pool.allocate(num_blocks) or []
    pool.publish(blocks, 0, hashes_of(num_blocks), root_hash(ModelId("m")))
    pool.release(blocks)
    return blocks


@dataclass
class Pair:
    """An owner and a reader in it that may pull."""

    owner: OwnerHalf
    half: Half
    reader: Reader
    hub: LoopbackHub

    @asynccontextmanager
    async def another(self) -> AsyncIterator["Pair"]:
        """A second reader of the same owner."""
        half = Half("second", self.hub)
        async with reading(half, TransferConfig()) as reader:
            yield Pair(self.owner, half, reader, self.hub)

    @asynccontextmanager
    async def other_owner(self, name: str) -> AsyncIterator["Pair"]:
        """Another owner of the same reader; by the same name it is another life of this one."""
        owner = OwnerHalf(self.hub, name)
        async with owner.serving():
            yield Pair(owner, self.half, self.reader, self.hub)

    def stream(self) -> "asyncio.Task[None]":
        """The reader's task that serves its stream to the owner."""
        incarnation = self.owner.hello.incarnation
        return self.reader._connections._live[incarnation][1]

    async def pull(
        self, lease: Lease, num_blocks: int, *, cached: int = 0, timeout_s: float = WAIT_S
    ) -> Pulled:
        """`cached`: blocks of the sequence that are in the reader's prefix cache already."""
        hashes = hashes_of(num_blocks)
        cache(self.half.pool, cached)
        return await self.pull_from(self.owner.handoff(lease), num_blocks, hashes, timeout_s)

    def pull_soon(self, lease: Lease, num_blocks: int) -> "asyncio.Task[Pulled]":
        """Under way; whoever wants its end awaits it."""
        return asyncio.create_task(self.pull(lease, num_blocks))

    async def pull_from(
        self,
        handoff: Handoff,
        num_blocks: int,
        hashes: Sequence[BlockHash] = (),
        timeout_s: float = WAIT_S,
        context_tokens: int | None = None,
    ) -> Pulled:
        return await self.reader.pull(
            PullRequest(
                handoff=handoff,
                sequence_id=SEQUENCE,
                hashes=hashes,
                context_tokens=context_tokens or num_blocks * LAYOUT.block_size,
                timeout_s=timeout_s,
            )
        )

    async def fetch(self, num_blocks: int, timeout_s: float = WAIT_S) -> FetchedPrefix:
        """The first blocks of the prompt, from the owner's cache."""
        source = PrefixSource(
            worker_id=self.owner.hello.worker_id,
            address=self.owner.address,
            incarnation=self.owner.hello.incarnation,
            num_blocks=num_blocks,
        )
        return await self.reader.fetch(
            FetchRequest(
                source=source,
                sequence_id=SEQUENCE,
                hashes=hashes_of(num_blocks),
                timeout_s=timeout_s,
            )
        )

    def assert_arrived(self, pulled: Pulled | FetchedPrefix, remote: Sequence[BlockId]) -> None:
        """The blocks not cached before hold what the owner's blocks `remote` hold."""
        here, there = list(pulled.blocks[pulled.cached_blocks :]), list(remote)
        assert torch.equal(self.half.arena.data[here], self.owner.arena.data[there])
        self.half.pool.release(pulled.blocks)
        self.assert_reader_holds_nothing()

    def assert_reader_holds_nothing(self) -> None:
        self.half.pool.check()
        counts = self.half.pool.counts()
        assert counts.free + counts.cached == NUM_BLOCKS, counts

    async def owner_holds_nothing(self) -> None:
        await until(lambda: self.owner.pool.counts().held == 0, "no lease left")
        self.owner.pool.check()
        self.owner.table.check()


@asynccontextmanager
async def reading(half: Half, config: TransferConfig) -> AsyncIterator[Reader]:
    async with Reader(
        pool=half.pool,
        arena=half.arena,
        transports=Transports([half.transport]),
        hello=lambda: half.hello,
        config=config,
        headroom=lambda: 0,
    ) as reader:
        yield reader


@asynccontextmanager
async def pair(
    *,
    read_timeout_s: float = 10.0,
    lease_s: float = LEASE_S,
    model: str = "m",
    verify: VerifyMode = "off",
    seals: bool = True,
    layouts: tuple[KvLayout, KvLayout] = (LAYOUT, LAYOUT),
) -> AsyncIterator[Pair]:
    """`lease_s` is what the reader believes: it renews every third of it. `layouts` are the owner's
    and the reader's.
    """
    hub = LoopbackHub()
    owner, half = OwnerHalf(hub, layout=layouts[0]), Half("reader", hub, model, layouts[1])
    config = TransferConfig(
        lease_s=lease_s, read_timeout_s=read_timeout_s, verify=verify, seals=seals
    )
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(owner.serving())
        reader = await stack.enter_async_context(reading(half, config))
        yield Pair(owner, half, reader, hub)


async def failure(pulling: "asyncio.Future[Pulled] | object") -> str:
    """The message of the TransferFailed that ends a pull."""
    with pytest.raises(TransferFailed) as caught:
        await pulling  # type: ignore[misc]
    return caught.value.message
