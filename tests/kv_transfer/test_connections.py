"""What a reader keeps of its owners: streams, and what the transports know beyond them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from core.ids import ShardId, shard_id
from kv_transfer import connections
from tests.builders import soon, until
from tests.kv_transfer.halves import HoldingTransport, Pair, pair


@pytest.fixture(autouse=True)
def room_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "_KEEP_KNOWN", 1)


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[ShardId]:
    """Which shards a reader has disconnected from, in order."""
    shards: list[ShardId] = []
    disconnect = HoldingTransport.disconnect

    async def note(self: HoldingTransport, peer: ShardId) -> None:
        shards.append(peer)
        await disconnect(self, peer)

    monkeypatch.setattr(HoldingTransport, "disconnect", note)
    return shards


def shard_of(p: Pair) -> ShardId:
    return shard_id(p.owner.hello.incarnation, 0)


async def hand_off(p: Pair) -> None:
    lease, blocks = p.owner.whole(2)
    p.assert_arrived(await p.pull(lease, 2), blocks)
    p.owner.pool.release(blocks)


async def cut(p: Pair) -> None:
    """The stream breaks; the owner lives on."""
    incarnation = p.owner.hello.incarnation
    p.reader._connections._live[incarnation][0].retire()
    await until(lambda: incarnation not in p.reader._connections._live, "the stream's end")


@asynccontextmanager
async def owners(count: int) -> AsyncIterator[list[Pair]]:
    """As many owners of one reader, one hand-off from each done."""
    async with pair() as p, AsyncExitStack() as stack:
        pairs = [p]
        for number in range(1, count):
            other = await stack.enter_async_context(p.other_owner(f"owner {number}"))
            pairs.append(other)
        for each in pairs:
            await hand_off(each)
        yield pairs


async def test_an_owner_whose_stream_lives_is_not_forgotten_beyond_the_bound(
    forgotten: list[ShardId],
) -> None:
    async with owners(3) as pairs:
        for _ in range(3):
            for p in pairs:
                await hand_off(p)
        assert not forgotten


async def test_beyond_the_bound_the_owner_without_a_stream_is_forgotten_that_was_not_used_longest(
    forgotten: list[ShardId],
) -> None:
    async with owners(3) as pairs:
        first, second, third = pairs
        await hand_off(first)
        await cut(third)
        await until(lambda: forgotten == [shard_of(third)], "the one without a stream")
        await cut(second)
        await until(lambda: len(forgotten) == 2)
        await cut(first)
        assert forgotten == [shard_of(third), shard_of(second)]
        for p in pairs:
            await hand_off(p)


async def test_the_end_of_a_stream_alone_forgets_nobody(forgotten: list[ShardId]) -> None:
    async with owners(1) as (p,):
        for _ in range(3):
            await cut(p)
            await hand_off(p)
        assert not forgotten


async def test_a_new_life_of_an_owner_ends_what_was_known_of_the_old_one(
    forgotten: list[ShardId],
) -> None:
    async with owners(1) as (p,):
        await cut(p)
        async with p.other_owner("owner") as reborn:
            await hand_off(reborn)
            await until(lambda: forgotten == [shard_of(p)], "the old life")


async def test_an_earlier_life_whose_stream_lives_is_read_until_that_ends(
    forgotten: list[ShardId],
) -> None:
    async with owners(1) as (p,), p.other_owner("owner") as reborn:
        await hand_off(reborn)
        await hand_off(p)
        await hand_off(reborn)
        assert not forgotten
        await cut(p)
        await until(lambda: forgotten == [shard_of(p)], "the old life")


async def test_a_disconnect_that_does_not_end_does_not_keep_the_reader_from_leaving(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = asyncio.Event()

    async def never(_self: HoldingTransport, _peer: ShardId) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(HoldingTransport, "disconnect", never)

    async def come_and_go() -> None:
        async with owners(2) as pairs:
            await cut(pairs[0])
            await soon(begun.wait())

    await soon(come_and_go())
