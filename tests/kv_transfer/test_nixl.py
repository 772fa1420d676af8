"""The real transport, two agents in one process: exact bytes, every failure a TransferFailed."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import pytest
import torch

from core.errors import TransferFailed
from core.ids import BlockId, Incarnation, new_incarnation
from core.kv import KvLayout
from engine.arena import Arena
from kv_transfer.nixl import NixlTransport
from kv_transfer.plan import Descriptor, plan_read
from kv_transfer.transport import ReadStats
from tests.builders import soon

LAYOUT = KvLayout(block_size=16, num_kv_heads=2, num_layers=2, head_dim=16, dtype="uint8")
BLOCK_BYTES = LAYOUT.block_bytes


@dataclass
class Side:
    """One agent and its arena of 16 blocks."""

    incarnation: Incarnation
    arena: Arena
    transport: NixlTransport

    def block(self, block_id: int) -> torch.Tensor:
        return self.arena.data[block_id]


@asynccontextmanager
async def two_sides(connected: bool = True) -> AsyncIterator[tuple[Side, Side]]:
    """A reader, its arena of zeros, and an owner, its arena of noise."""
    async with AsyncExitStack() as stack:
        sides = []
        for _ in range(2):
            incarnation, arena = new_incarnation(), Arena(LAYOUT, 16)
            side = Side(incarnation, arena, NixlTransport(arena, incarnation))
            stack.push_async_callback(side.transport.close)
            sides.append(side)
        reader, owner = sides
        owner.arena.data.random_(0, 256, generator=torch.Generator().manual_seed(0))
        if connected:
            await soon(reader.transport.connect(owner.incarnation, owner.transport.memory()))
        yield reader, owner


async def read(reader: Side, owner: Side, remote: list[int], local: list[int]) -> ReadStats:
    plan = plan_read([BlockId(b) for b in remote], [BlockId(b) for b in local], BLOCK_BYTES)
    stats = await soon(reader.transport.start_read(owner.incarnation, plan))
    assert isinstance(stats, ReadStats)
    return stats


async def test_blocks_arrive_exactly_and_nothing_else_changes() -> None:
    async with two_sides() as (reader, owner):
        remote, local = [3, 4, 9, 0], [7, 8, 2, 15]
        await read(reader, owner, remote, local)
        for there, here in zip(remote, local, strict=True):
            assert torch.equal(reader.block(here), owner.block(there))
        untouched = sorted(set(range(16)) - set(local))
        assert not reader.arena.data[untouched].any()


async def test_neighbouring_blocks_are_one_descriptor() -> None:
    async with two_sides() as (reader, owner):
        stats = await read(reader, owner, [3, 4, 5, 9], [7, 8, 9, 11])
        assert (stats.descriptors, stats.nbytes) == (2, 4 * BLOCK_BYTES)


async def test_reads_are_counted() -> None:
    async with two_sides() as (reader, owner):
        await read(reader, owner, [1], [1])
        await read(reader, owner, [4, 6], [4, 6])
        counters = reader.transport.counters
        assert (counters.reads, counters.failures) == (2, 0)
        assert (counters.nbytes, counters.descriptors) == (3 * BLOCK_BYTES, 3)
        assert owner.transport.counters.reads == 0


async def test_a_second_read_sees_what_the_owner_wrote_since() -> None:
    async with two_sides() as (reader, owner):
        await read(reader, owner, [1], [1])
        owner.block(1)[...] = 42
        await read(reader, owner, [1], [1])
        assert (reader.block(1) == 42).all()


async def test_metadata_that_is_none_is_refused() -> None:
    async with two_sides(connected=False) as (reader, owner):
        garbage = replace(owner.transport.memory(), metadata=b"not an agent")
        with pytest.raises(TransferFailed):
            await soon(reader.transport.connect(owner.incarnation, garbage))
        await soon(reader.transport.connect(owner.incarnation, owner.transport.memory()))
        await read(reader, owner, [1], [1])


async def test_another_transport_is_refused() -> None:
    async with two_sides(connected=False) as (reader, owner):
        with pytest.raises(TransferFailed, match="moves KV by loopback"):
            other = replace(owner.transport.memory(), transport="loopback")
            await reader.transport.connect(owner.incarnation, other)


async def test_a_read_from_a_disconnected_peer_fails_and_is_counted() -> None:
    async with two_sides() as (reader, owner):
        await soon(reader.transport.disconnect(owner.incarnation))
        with pytest.raises(TransferFailed, match="not connected"):
            await read(reader, owner, [1], [1])
        assert reader.transport.counters.failures == 1


async def test_connecting_again_after_a_disconnect_reads_again() -> None:
    async with two_sides() as (reader, owner):
        for _ in range(2):
            await soon(reader.transport.disconnect(owner.incarnation))
            await soon(reader.transport.connect(owner.incarnation, owner.transport.memory()))
        await read(reader, owner, [5], [5])
        assert torch.equal(reader.block(5), owner.block(5))


async def test_connect_and_disconnect_may_repeat() -> None:
    async with two_sides() as (reader, owner):
        await soon(reader.transport.connect(owner.incarnation, owner.transport.memory()))
        await soon(reader.transport.disconnect(owner.incarnation))
        await soon(reader.transport.disconnect(owner.incarnation))


async def test_a_plan_past_the_peers_arena_is_refused() -> None:
    async with two_sides() as (reader, owner):
        past = [Descriptor(16 * BLOCK_BYTES, 0, BLOCK_BYTES)]
        with pytest.raises(TransferFailed, match="past the peer's arena"):
            await soon(reader.transport.start_read(owner.incarnation, past))


async def test_a_closed_transport_has_ended_its_thread() -> None:
    async with two_sides() as (reader, _owner):
        await soon(reader.transport.close())
        assert not reader.transport._thread.is_alive()
