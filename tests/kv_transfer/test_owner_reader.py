"""A hand-off between two halves in one process: a real gRPC stream, a loopback transport."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import pytest
import torch

from core.blocks import chain_hashes, root_hash
from core.channel import SERVER_OPTIONS
from core.clock import FakeClock
from core.errors import DeadlineExceeded, TransferFailed
from core.ids import (
    BlockHash,
    BlockId,
    Incarnation,
    LeaseId,
    ModelId,
    RequestId,
    SequenceId,
    WorkerId,
    new_incarnation,
)
from core.kv import KvLayout
from core.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR, Handoff
from engine.arena import Arena
from engine.pool import BlockPool
from kv_transfer.codec import from_reader_to_wire
from kv_transfer.config import TransferConfig
from kv_transfer.leases import FirstToken, Lease, LeaseTable
from kv_transfer.loopback import LoopbackHub, LoopbackTransport
from kv_transfer.messages import Bind, Memory, PeerHello
from kv_transfer.owner import Owner
from kv_transfer.plan import Descriptor
from kv_transfer.reader import Pulled, PullRequest, Reader
from kv_transfer.server import add_peer_service
from kv_transfer.transport import ReadStats, TransportCounters
from tests.builders import NEWER_MESSAGE, WAIT_S, soon, until
from wire import peer_pb2, peer_pb2_grpc

LAYOUT = KvLayout(block_size=4, num_kv_heads=1, num_layers=1, head_dim=4, dtype="uint8")
NUM_BLOCKS = 16
LEASE_S = 10.0
SEQUENCE = SequenceId(RequestId("r"))
LAST = FirstToken(token=77, ended=False)


class HoldingTransport:
    """Loopback whose reads do not start until `let_go`: a slow or hanging network."""

    name = "loopback"

    def __init__(self, inner: LoopbackTransport) -> None:
        self._inner = inner
        self._held: list[tuple[Incarnation, Sequence[Descriptor], asyncio.Future[ReadStats]]] = []
        self.holds = True

    @property
    def counters(self) -> TransportCounters:
        return self._inner.counters

    @property
    def waiting(self) -> int:
        return len(self._held)

    def memory(self) -> Memory:
        return self._inner.memory()

    async def connect(self, peer: Incarnation, memory: Memory) -> None:
        await self._inner.connect(peer, memory)

    def start_read(
        self, peer: Incarnation, plan: Sequence[Descriptor]
    ) -> "asyncio.Future[ReadStats]":
        if not self.holds:
            return self._inner.start_read(peer, plan)
        future: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        self._held.append((peer, plan, future))
        return future

    async def disconnect(self, peer: Incarnation) -> None:
        await self._inner.disconnect(peer)

    async def failed(self) -> Exception:
        return await self._inner.failed()

    async def close(self) -> None:
        await self._inner.close()

    def let_go(self, count: int | None = None) -> None:
        """Carry out the reads held so far, or the first `count` of them."""
        going, self._held = self._held[:count], self._held[len(self._held[:count]) :]
        for peer, plan, future in going:
            done = self._inner.start_read(peer, plan)
            error = done.exception()
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result())


class Half:
    """What both sides have: a pool, an arena, a transport, an identity."""

    def __init__(self, name: str, hub: LoopbackHub, model: str = "m") -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.arena = Arena(LAYOUT, NUM_BLOCKS)
        self.transport = HoldingTransport(LoopbackTransport(self.arena, hub))
        self.transport.holds = False
        self.hello = PeerHello(
            worker_id=WorkerId(name),
            incarnation=new_incarnation(),
            model_id=ModelId(model),
            layout=LAYOUT,
            memory=self.transport.memory(),
        )


class OwnerHalf(Half):
    """Leases behind a real door; its clock moves only when told."""

    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__("owner", hub)
        self.arena.data.random_(0, 256, generator=torch.Generator().manual_seed(0))
        self.clock = FakeClock()
        self.table = LeaseTable(self.pool, self.clock, LEASE_S)
        self.owner = Owner(self.table, lambda: None)
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        add_peer_service(self.server, self.owner, self.hello)

    def open(self, num_blocks: int) -> tuple[Lease, list[BlockId]]:
        """A lease, and the blocks its prefill will announce."""
        return self.owner.open(SEQUENCE), self.pool.allocate(num_blocks) or []

    def whole(self, num_blocks: int) -> tuple[Lease, list[BlockId]]:
        """A lease whose prefill has ended."""
        lease, blocks = self.open(num_blocks)
        self.owner.finish(lease, blocks, LAST)
        return lease, blocks

    def handoff(self, lease: Lease) -> Handoff:
        return Handoff(
            owner_id=self.hello.worker_id,
            owner_address=self.address,
            owner_incarnation=self.hello.incarnation,
            lease_id=lease.lease_id,
        )


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

    async def pull(
        self, lease: Lease, num_blocks: int, *, cached: int = 0, timeout_s: float = WAIT_S
    ) -> Pulled:
        """`cached`: blocks of the sequence that are in the reader's prefix cache already."""
        root = root_hash(self.half.hello.model_id)
        hashes = chain_hashes([7] * num_blocks, 1, root)
        own = self.half.pool.allocate(cached) or []
        for block_id, block_hash, parent in zip(own, hashes, [root, *hashes], strict=False):
            self.half.pool.publish(block_id, block_hash, parent)
        self.half.pool.release(own)
        return await self.pull_from(self.owner.handoff(lease), num_blocks, hashes, timeout_s)

    async def pull_from(
        self,
        handoff: Handoff,
        num_blocks: int,
        hashes: Sequence[BlockHash] = (),
        timeout_s: float = WAIT_S,
    ) -> Pulled:
        return await self.reader.pull(
            PullRequest(
                handoff=handoff,
                sequence_id=SEQUENCE,
                hashes=hashes,
                num_blocks=num_blocks,
                timeout_s=timeout_s,
            )
        )

    def assert_arrived(self, pulled: Pulled, remote: Sequence[BlockId]) -> None:
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
    async with Reader(half.pool, half.transport, half.hello, config, lambda: 0) as reader:
        yield reader


@asynccontextmanager
async def pair(
    *, read_timeout_s: float = 10.0, lease_s: float = LEASE_S, model: str = "m"
) -> AsyncIterator[Pair]:
    """`lease_s` is what the reader believes: it renews every third of it."""
    hub = LoopbackHub()
    owner, half = OwnerHalf(hub), Half("reader", hub, model)
    config = TransferConfig(lease_s=lease_s, read_timeout_s=read_timeout_s)
    async with AsyncExitStack() as stack:
        await owner.server.start()
        stack.push_async_callback(owner.server.stop, None)
        reader = await stack.enter_async_context(reading(half, config))
        yield Pair(owner, half, reader, hub)


# -- what arrives -------------------------------------------------------------------------------


async def test_blocks_are_read_while_later_chunks_still_run() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(5)
        pulling = group.create_task(p.pull(lease, 5))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.counters.reads == 1)
        p.owner.owner.announce(lease, blocks[2:3])
        await until(lambda: p.half.transport.counters.reads == 2)
        assert not pulling.done()
        p.owner.owner.finish(lease, blocks[3:], LAST)
        pulled = await soon(pulling)
        assert isinstance(pulled, Pulled)
        assert (pulled.first_token, pulled.ended) == (77, False)
        assert pulled.nbytes == 5 * LAYOUT.block_bytes
        p.assert_arrived(pulled, blocks)
        await p.owner_holds_nothing()
        assert p.owner.table.counters.closed == 1


async def test_blocks_the_reader_has_already_are_not_read() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(5)
        pulled = await p.pull(lease, 5, cached=3)
        assert pulled.cached_blocks == 3
        assert pulled.nbytes == 2 * LAYOUT.block_bytes
        p.assert_arrived(pulled, blocks[3:])


async def test_a_reader_that_has_everything_reads_nothing_and_still_asks() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(4)
        pulled = await p.pull(lease, 4, cached=4)
        assert (pulled.cached_blocks, pulled.nbytes, pulled.first_token) == (4, 0, 77)
        assert p.owner.table.counters.closed == 1


async def test_binding_before_the_wanted_blocks_exist_waits_for_them() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(5)
        p.owner.owner.announce(lease, blocks[:2])
        pulling = group.create_task(p.pull(lease, 5, cached=3))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[2:4])
        p.owner.owner.finish(lease, blocks[4:], LAST)
        p.assert_arrived(await pulling, blocks[3:])


async def test_binding_after_the_prefill_has_ended_reads_all_at_once() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(4)
        pulled = await p.pull(lease, 4)
        assert p.half.transport.counters.reads == 1
        p.assert_arrived(pulled, blocks)


async def test_a_reader_that_binds_after_the_answer_has_ended_is_told_so() -> None:
    async with pair() as p:
        lease, blocks = p.owner.open(3)
        p.owner.owner.finish(lease, blocks, FirstToken(token=5, ended=True))
        pulled = await p.pull(lease, 3)
        assert (pulled.blocks, pulled.first_token, pulled.ended) == ((), 5, True)
        p.assert_reader_holds_nothing()


async def test_an_answer_that_ended_with_its_first_token_is_not_read() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(3)
        pulling = group.create_task(p.pull(lease, 3))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        p.owner.owner.finish(lease, blocks[2:], FirstToken(token=5, ended=True))
        pulled = await pulling
        assert (pulled.blocks, pulled.first_token, pulled.ended) == ((), 5, True)
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_many_pulls_share_one_stream() -> None:
    async with pair() as p:
        leases = [p.owner.whole(2) for _ in range(4)]
        pulled = await asyncio.gather(*(p.pull(lease, 2) for lease, _ in leases))
        for each, (_, blocks) in zip(pulled, leases, strict=True):
            here = list(each.blocks)
            assert torch.equal(p.half.arena.data[here], p.owner.arena.data[blocks])
        assert len(p.owner.owner._readers) == 1


async def test_the_reader_renews_while_it_waits() -> None:
    async with pair(lease_s=0.03) as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.whole(2)
        p.half.transport.holds = True
        pulling = group.create_task(p.pull(lease, 2))
        await until(lambda: p.half.transport.waiting == 1)
        p.owner.clock.advance(LEASE_S - 1)
        before_s = lease.expires_at_s
        await until(lambda: lease.expires_at_s > before_s, "a renewal")
        p.half.transport.let_go()
        p.assert_arrived(await pulling, blocks)


async def test_a_pull_waits_until_blocks_are_free() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        taken = p.half.pool.allocate(NUM_BLOCKS - 1) or []
        lease, blocks = p.owner.whole(3)
        pulling = group.create_task(p.pull(lease, 3))
        await until(lambda: lease.reader is not None, "the reader bound")
        assert not pulling.done()
        p.half.pool.release(taken)
        p.reader.space_freed()
        p.assert_arrived(await pulling, blocks)


# -- what goes wrong ----------------------------------------------------------------------------


async def test_an_abort_by_the_owner_fails_the_pull_and_frees_the_blocks() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.counters.reads == 1)
        p.owner.owner.abort(lease.lease_id, "its request was cancelled")
        assert "its request was cancelled" in await pulling
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def failure(pulling: "asyncio.Future[Pulled] | object") -> str:
    """The message of the TransferFailed that ends a pull."""
    with pytest.raises(TransferFailed) as caught:
        await pulling  # type: ignore[misc]
    return caught.value.message


async def test_an_expired_lease_discards_what_was_read() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, _ = p.owner.whole(3)
        p.half.transport.holds = True
        pulling = group.create_task(failure(p.pull(lease, 3)))
        await until(lambda: p.half.transport.waiting == 1)
        p.owner.clock.advance(LEASE_S)
        p.half.transport.let_go()
        assert "the lease expired" in await pulling
        p.assert_reader_holds_nothing()
        assert p.owner.table.counters.expired == 1


async def test_an_expiry_during_the_wait_for_memory_fails_the_pull() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, _ = p.owner.whole(3)
        taken = p.half.pool.allocate(NUM_BLOCKS) or []
        pulling = group.create_task(failure(p.pull(lease, 3)))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.clock.advance(LEASE_S)
        p.owner.owner.sweep()
        p.half.pool.release(taken)
        await pulling
        p.assert_reader_holds_nothing()


async def test_a_read_that_does_not_end_quarantines_its_blocks_until_it_does() -> None:
    async with pair(read_timeout_s=0.02) as p:
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        assert "did not end in time" in await failure(p.pull(lease, 3))
        assert p.half.pool.counts().quarantined == 3
        await p.owner_holds_nothing()
        p.half.transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()


async def test_blocks_stay_quarantined_until_the_last_of_their_reads_ends() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        p.half.transport.holds = True
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: lease.reader is not None, "the reader bound")
        for i in range(2):
            p.owner.owner.announce(lease, blocks[i : i + 1])
            await until(lambda i=i: p.half.transport.waiting == i + 1)  # type: ignore[misc]
        p.owner.owner.abort(lease.lease_id, "cancelled")
        await pulling
        p.half.transport.let_go(1)
        await asyncio.sleep(0)
        assert p.half.pool.counts().quarantined == 4
        p.half.transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()


async def test_a_cancelled_pull_ends_the_lease_and_quarantines_what_is_read() -> None:
    async with pair() as p:
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        pulling = asyncio.create_task(p.pull(lease, 3))
        await until(lambda: p.half.transport.waiting == 1)
        pulling.cancel()
        await asyncio.wait([pulling])
        assert p.half.pool.counts().quarantined == 3
        await p.owner_holds_nothing()
        p.half.transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()


async def test_a_lost_reader_frees_the_owners_blocks_at_once() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        pulling = group.create_task(failure(p.pull(lease, 3)))
        await until(lambda: p.half.transport.waiting == 1)
        (_connection, stream), *_ = p.reader._connections.values()
        stream.cancel()
        await p.owner_holds_nothing()
        assert p.owner.table.counters.aborted == 1
        await pulling
        assert p.half.pool.counts().quarantined == 3
        p.half.transport.let_go()
        await until(lambda: p.half.pool.counts().quarantined == 0)
        p.assert_reader_holds_nothing()


async def test_a_lost_owner_fails_the_pull() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.counters.reads == 1)
        await p.owner.server.stop(None)
        await pulling
        p.assert_reader_holds_nothing()


async def test_a_transport_that_fails_fails_the_pull() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        p.half.transport.holds = True
        async with asyncio.TaskGroup() as group:
            pulling = group.create_task(failure(p.pull(lease, 3)))
            await until(lambda: p.half.transport.waiting == 1)
            await p.owner.transport.close()
            p.half.transport.let_go()
            assert "memory is gone" in await pulling
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_a_restarted_owner_is_not_read_from() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        stale = replace(p.owner.handoff(lease), owner_incarnation=Incarnation("before"))
        assert "restarted" in await failure(p.pull_from(stale, 3))
        p.assert_reader_holds_nothing()


async def test_a_reader_of_another_model_is_refused() -> None:
    async with pair(model="another") as p:
        lease, _ = p.owner.whole(3)
        assert "another" in await failure(p.pull(lease, 3))
        p.assert_reader_holds_nothing()


async def test_nobody_at_the_address_fails_the_pull() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        await p.owner.server.stop(None)
        await failure(p.pull(lease, 3))
        p.assert_reader_holds_nothing()


async def test_a_lease_that_does_not_exist_fails_the_pull() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(1)
        unknown = replace(p.owner.handoff(lease), lease_id=LeaseId(99))
        assert "no such lease" in await failure(p.pull_from(unknown, 3))


async def test_a_lease_has_one_reader() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.open(2)
        pulling = group.create_task(p.pull(lease, 2))
        await until(lambda: lease.reader is not None, "the reader bound")
        async with p.another() as second:
            assert "reader" in await failure(second.pull(lease, 2))
        p.owner.owner.finish(lease, blocks, LAST)
        p.assert_arrived(await pulling, blocks)


async def test_kv_that_does_not_come_in_time_fails_the_pull() -> None:
    async with pair() as p:
        lease, _ = p.owner.open(2)
        with pytest.raises(DeadlineExceeded):
            await p.pull(lease, 2, timeout_s=0.05)
        await p.owner_holds_nothing()


async def test_a_new_stream_is_opened_after_one_was_lost() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(2)
        p.assert_arrived(await p.pull(lease, 2), blocks)
        (_connection, stream), *_ = p.reader._connections.values()
        stream.cancel()
        await asyncio.wait([stream])
        lease, blocks = p.owner.whole(2)
        p.assert_arrived(await p.pull(lease, 2), blocks)


# -- the owner's door ---------------------------------------------------------------------------


@asynccontextmanager
async def bare_stream(
    p: Pair,
) -> AsyncIterator[grpc.aio.StreamStreamCall[peer_pb2.FromReader, peer_pb2.FromOwner]]:
    async with grpc.aio.insecure_channel(p.owner.address) as channel:
        yield peer_pb2_grpc.PeerStub(channel).PeerStream()


def hello(p: Pair, **changed: int) -> peer_pb2.FromReader:
    return from_reader_to_wire(replace(p.half.hello, **changed))  # type: ignore[arg-type]


async def test_another_major_version_is_refused() -> None:
    async with pair() as p, bare_stream(p) as stream:
        await stream.write(hello(p, protocol_major=PROTOCOL_MAJOR + 1))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await soon(stream.read())
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_stream_without_a_hello_is_refused() -> None:
    async with pair() as p, bare_stream(p) as stream:
        bind = Bind(lease_id=LeaseId(1), sequence_id=SEQUENCE, first_block=0)
        await stream.write(from_reader_to_wire(bind))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await soon(stream.read())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_newer_minor_version_and_its_messages_are_served() -> None:
    async with pair() as p, bare_stream(p) as stream:
        lease, blocks = p.owner.whole(2)
        await stream.write(hello(p, protocol_minor=PROTOCOL_MINOR + 1))
        assert (await soon(stream.read())).WhichOneof("message") == "hello"  # type: ignore[attr-defined]
        await stream.write(peer_pb2.FromReader.FromString(NEWER_MESSAGE))
        bind = Bind(lease_id=lease.lease_id, sequence_id=SEQUENCE, first_block=0)
        await stream.write(from_reader_to_wire(bind))
        answer = await soon(stream.read())
        assert list(answer.announce.block_ids) == blocks  # type: ignore[attr-defined]
