"""What kv_transfer/transport.py promises, of every transport, with the real thing on both ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import pytest

from core.clock import SystemClock
from core.errors import TransferCause, TransferFailed
from kv_transfer.loopback import LoopbackHub
from kv_transfer.messages import Seal
from kv_transfer.transport import ReadStats, Sealed
from tests.builders import soon
from tests.kv_transfer.transport_sides import (
    BLOCK_BYTES,
    Row,
    Side,
    make_plan,
    owner_processes,
    side,
)

KINDS = ("nixl", "collective", "loopback")
BOUND_S = 15.0


class NewSide(Protocol):
    """A fresh end of one kind, all of them in reach of each other."""

    def __call__(
        self, *, num_blocks: int = 256, seed: int = 0
    ) -> AbstractAsyncContextManager[Side]: ...


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_side(kind: str) -> NewSide:
    return partial(side, kind, LoopbackHub())


@pytest.fixture
async def pair(new_side: NewSide) -> AsyncIterator[tuple[Side, Side]]:
    """A reader that is connected to an owner."""
    async with new_side(seed=1) as reader, new_side(seed=2) as owner:
        await reader.connect(owner)
        yield reader, owner


def after(reader: Side, owner: Side, rows: list[Row]) -> "np.ndarray[tuple[int], np.dtype]":
    """What the reader's arena must be once these rows were read into it as it is now."""
    expected = reader.data.copy()
    for source, target, nbytes in rows:
        expected[target : target + nbytes] = owner.data[source : source + nbytes]
    return expected


def blocks(*pairs: tuple[int, int]) -> list[Row]:
    return [(there * BLOCK_BYTES, here * BLOCK_BYTES, BLOCK_BYTES) for there, here in pairs]


def scattered(count: int, slot_bytes: int, nbytes: int, seed: int = 0) -> list[Row]:
    """`count` runs of `nbytes`, each in a slot of its own on both sides, in no order."""
    random = np.random.default_rng(seed)
    there, here = (random.permutation(count) * slot_bytes for _ in range(2))
    return [(int(a), int(b), nbytes) for a, b in zip(there, here, strict=True)]


# -- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(3 * BLOCK_BYTES, 7 * BLOCK_BYTES, 5 * BLOCK_BYTES)], id="contiguous"),
        pytest.param(blocks((3, 7), (4, 8), (9, 2), (0, 255)), id="scattered"),
        pytest.param([(0, 0, 256 * BLOCK_BYTES)], id="whole arena"),
        pytest.param(scattered(4096, 256, 128), id="many fragments"),
        pytest.param([(1, 3, 1), (7, 5, 1001), (5000, 9001, 333)], id="odd bytes"),
    ],
)
async def test_bytes_land_in_their_places_and_nowhere_else(
    pair: tuple[Side, Side], rows: list[Row]
) -> None:
    reader, owner = pair
    expected = after(reader, owner, rows)
    stats = await reader.read(owner, rows)
    assert np.array_equal(reader.data, expected)
    assert (stats.descriptors, stats.nbytes) == (len(rows), sum(row[2] for row in rows))
    assert stats.seconds >= 0


async def test_a_big_read_arrives_whole(new_side: NewSide) -> None:
    num_blocks = (64 << 20) // BLOCK_BYTES
    async with (
        new_side(num_blocks=num_blocks, seed=1) as reader,
        new_side(num_blocks=num_blocks, seed=2) as owner,
    ):
        await reader.connect(owner)
        await reader.read(owner, [(0, 0, 64 << 20)])
        assert np.array_equal(reader.data, owner.data)
        rows = scattered(num_blocks // 2, 2 * BLOCK_BYTES, BLOCK_BYTES + 1, seed=3)
        owner.data[:] = owner.data[::-1].copy()
        expected = after(reader, owner, rows)
        await reader.read(owner, rows)
        assert np.array_equal(reader.data, expected)


async def test_a_second_read_sees_what_the_owner_wrote_since(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    await reader.read(owner, blocks((1, 1)))
    owner.data[BLOCK_BYTES : 2 * BLOCK_BYTES] = 42
    await reader.read(owner, blocks((1, 1)))
    assert (reader.data[BLOCK_BYTES : 2 * BLOCK_BYTES] == 42).all()


async def test_reads_in_flight_together_all_land(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    plans = [blocks((i, 255 - i), (i + 64, 191 - i)) for i in range(64)]
    expected = after(reader, owner, [row for plan in plans for row in plan])
    await soon(asyncio.gather(*(reader.start(owner, plan) for plan in plans)))
    assert np.array_equal(reader.data, expected)


# -- seals -------------------------------------------------------------------------------------


async def test_a_seal_is_told_to_be_whole_by_the_ways_that_can_and_never_where_it_is_not(
    kind: str, pair: tuple[Side, Side]
) -> None:
    reader, owner = pair
    rows = blocks((1, 1))
    tells = kind != "collective"
    for _ in range(3):  # slots are used again
        seal, other = owner.seals.set_one(), owner.seals.set_one()
        assert seal is not None
        assert other is not None
        assert (await reader.read(owner, rows, Sealed(seal))).sealed is tells
        assert not (await reader.read(owner, rows)).sealed
        owner.seals.break_one(seal)
        assert not (await reader.read(owner, rows, Sealed(seal))).sealed
        assert (await reader.read(owner, rows, Sealed(other))).sealed is tells
        owner.seals.break_one(other)
    nowhere = Seal(slot=len(owner.seals.words), word=1)
    assert not (await reader.read(owner, rows, Sealed(nowhere))).sealed
    expected = after(reader, owner, rows)
    await reader.read(owner, rows, Sealed(nowhere))
    assert np.array_equal(reader.data, expected)


async def test_seals_of_many_reads_under_way_are_told_apart(
    kind: str, pair: tuple[Side, Side]
) -> None:
    reader, owner = pair
    seals = [seal for _ in range(100) if (seal := owner.seals.set_one()) is not None]
    for seal in seals[::3]:
        owner.seals.break_one(seal)
    reads = [reader.start(owner, blocks((i, i)), Sealed(seal)) for i, seal in enumerate(seals)]
    stats = await soon(asyncio.gather(*reads))
    tells = kind != "collective"
    assert [s.sealed for s in stats] == [tells and i % 3 != 0 for i in range(100)]


async def test_a_peer_without_seals_is_read_all_the_same(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    bare = replace(owner.transport.memory(), seal_address=0, seal_slots=0)
    await soon(reader.transport.disconnect(owner.shard))
    await soon(reader.transport.connect(owner.shard, bare))
    await reader.read(owner, blocks((1, 1)), Sealed(Seal(slot=0, word=1)))


@pytest.mark.processes
async def test_a_seal_of_another_process_is_seen() -> None:
    async with (
        owner_processes("nixl", 64, seeds=[2]) as (owner,),
        side("nixl", LoopbackHub(), num_blocks=64, seed=1) as reader,
    ):
        await soon(reader.transport.connect(owner.shard, owner.memory))
        whole = make_plan([(0, 0, 64 * BLOCK_BYTES)])
        other = Seal(slot=owner.seal.slot, word=owner.seal.word + 1)
        for seal, is_whole in ((owner.seal, True), (other, False), (owner.seal, True)):
            stats = await soon(reader.transport.start_read(owner.shard, whole, Sealed(seal)))
            assert stats.sealed is is_whole


# -- who reads whom -----------------------------------------------------------------------------


async def test_two_readers_of_one_owner(new_side: NewSide) -> None:
    async with new_side(seed=1) as one, new_side(seed=2) as two, new_side(seed=3) as owner:
        for reader in (one, two):
            await reader.connect(owner)
        rows = scattered(128, 2 * BLOCK_BYTES, BLOCK_BYTES)
        expected = [after(reader, owner, rows) for reader in (one, two)]
        await soon(asyncio.gather(one.start(owner, rows), two.start(owner, rows)))
        assert np.array_equal(one.data, expected[0])
        assert np.array_equal(two.data, expected[1])


async def test_one_reader_of_two_owners(new_side: NewSide) -> None:
    async with new_side(seed=1) as reader, new_side(seed=2) as one, new_side(seed=3) as two:
        for owner in (one, two):
            await reader.connect(owner)
        await soon(
            asyncio.gather(reader.start(one, blocks((1, 1))), reader.start(two, blocks((1, 2))))
        )
        for place, owner in ((1, one), (2, two)):
            here = reader.data[place * BLOCK_BYTES : (place + 1) * BLOCK_BYTES]
            assert np.array_equal(here, owner.data[BLOCK_BYTES : 2 * BLOCK_BYTES])


async def test_two_sides_read_each_other(pair: tuple[Side, Side]) -> None:
    one, two = pair
    await two.connect(one)
    expected = after(one, two, blocks((1, 1))), after(two, one, blocks((2, 2)))
    await soon(asyncio.gather(one.start(two, blocks((1, 1))), two.start(one, blocks((2, 2)))))
    assert np.array_equal(one.data, expected[0])
    assert np.array_equal(two.data, expected[1])


# -- coming and going ---------------------------------------------------------------------------


async def test_connect_and_disconnect_may_repeat(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    await reader.connect(owner)
    await reader.read(owner, blocks((1, 1)))
    for _ in range(2):
        await soon(reader.transport.disconnect(owner.shard))
    await reader.connect(owner)
    await reader.read(owner, blocks((2, 2)))


async def test_a_peer_never_heard_of_can_be_disconnected(new_side: NewSide) -> None:
    async with new_side() as reader, new_side() as owner:
        await soon(reader.transport.disconnect(owner.shard))


async def test_a_read_from_a_disconnected_peer_fails(pair: tuple[Side, Side]) -> None:
    reader, owner = pair
    await soon(reader.transport.disconnect(owner.shard))
    before = reader.data.copy()
    with pytest.raises(TransferFailed, match="not connected") as failure:
        await reader.read(owner, blocks((1, 1)))
    assert failure.value.cause is TransferCause.READ_FAILED
    assert np.array_equal(reader.data, before)


async def test_the_memory_of_another_transport_is_refused(new_side: NewSide) -> None:
    async with new_side() as reader, new_side() as owner:
        other = replace(owner.transport.memory(), transport="pigeon")
        with pytest.raises(TransferFailed, match="moves KV by pigeon") as failure:
            await soon(reader.transport.connect(owner.shard, other))
        assert failure.value.cause is TransferCause.NO_TRANSPORT


async def test_memory_says_what_the_arena_is(kind: str, new_side: NewSide) -> None:
    async with new_side() as owner:
        memory = owner.transport.memory()
        assert memory.transport == owner.transport.name == kind
        assert (memory.address, memory.nbytes) == (owner.arena.address, owner.arena.nbytes)


# -- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "whose"),
    [
        ((256 * BLOCK_BYTES, 0, BLOCK_BYTES), "the peer's"),
        ((255 * BLOCK_BYTES, 0, BLOCK_BYTES + 1), "the peer's"),
        ((0, 256 * BLOCK_BYTES, BLOCK_BYTES), "this worker's"),
    ],
)
@pytest.mark.parametrize("others", [1, 100], ids=["few runs", "many runs"])
async def test_a_plan_past_an_arena_fails_alone(
    pair: tuple[Side, Side], row: Row, whose: str, others: int
) -> None:
    reader, owner = pair
    before = reader.data.copy()
    with pytest.raises(TransferFailed, match=f"past {whose} arena"):
        await reader.read(owner, [*blocks(*((2 * i, 2 * i) for i in range(others))), row])
    assert np.array_equal(reader.data, before)
    await reader.read(owner, blocks((1, 1)))


async def ended(reads: "list[asyncio.Future[ReadStats]]") -> list[ReadStats | TransferFailed]:
    """How each ended, all of them in time."""
    async with asyncio.timeout(BOUND_S):
        results = await asyncio.gather(*reads, return_exceptions=True)
    for result in results:
        assert isinstance(result, ReadStats | TransferFailed), result
    return results  # type: ignore[return-value]


async def test_reads_end_when_the_owner_closes_in_the_middle(new_side: NewSide) -> None:
    num_blocks = (32 << 20) // BLOCK_BYTES
    async with new_side(num_blocks=num_blocks, seed=1) as reader:
        async with new_side(num_blocks=num_blocks, seed=2) as owner:
            await reader.connect(owner)
            reads = [reader.start(owner, [(0, 0, 32 << 20)]) for _ in range(6)]
            await reads[0]
        await ended(reads)
        await soon(reader.transport.disconnect(owner.shard))
        async with new_side(seed=3) as other:
            await reader.connect(other)
            rows = blocks((1, 1))
            expected = after(reader, other, rows)
            await reader.read(other, rows)
            assert np.array_equal(reader.data, expected)


async def test_close_ends_pending_reads(new_side: NewSide) -> None:
    num_blocks = (32 << 20) // BLOCK_BYTES
    async with (
        new_side(num_blocks=num_blocks, seed=1) as reader,
        new_side(num_blocks=num_blocks, seed=2) as owner,
    ):
        await reader.connect(owner)
        reads = [reader.start(owner, [(0, 0, 32 << 20)]) for _ in range(6)]
        async with asyncio.timeout(BOUND_S):
            await reader.transport.close()
        await ended(reads)
        before = reader.data.copy()
        owner.data[:] ^= 255
        assert np.array_equal(reader.data, before)


async def test_an_owner_that_is_gone_fails_in_time_and_a_living_one_is_read_after(
    new_side: NewSide,
) -> None:
    async with new_side(seed=1) as reader, new_side(seed=2) as living:
        async with new_side(seed=3) as dead:
            memory = dead.transport.memory()
        before, started_s = reader.data.copy(), SystemClock().now_s()
        with pytest.raises(TransferFailed):
            async with asyncio.timeout(BOUND_S):
                await reader.transport.connect(dead.shard, memory)
                await reader.start(dead, blocks((1, 1)))
        assert SystemClock().now_s() - started_s < BOUND_S
        assert np.array_equal(reader.data, before)
        await reader.connect(living)
        await reader.read(living, blocks((1, 1)))


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["nixl", "collective"])
async def test_reads_end_when_the_owner_is_killed_in_the_middle(kind: str) -> None:
    nbytes = 32 << 20
    num_blocks = nbytes // BLOCK_BYTES
    async with (
        owner_processes(kind, num_blocks, seeds=[2, 3]) as (first, second),
        side(kind, LoopbackHub(), num_blocks=num_blocks, seed=1) as reader,
    ):
        transport = reader.transport
        for owner in (first, second):
            await soon(transport.connect(owner.shard, owner.memory))
        whole = make_plan([(0, 0, nbytes)])
        reads = [transport.start_read(first.shard, whole) for _ in range(64)]
        async with asyncio.timeout(BOUND_S):
            await reads[0]
        first.kill()
        results = await ended(reads)
        assert isinstance(results[-1], TransferFailed)
        await soon(transport.disconnect(first.shard))
        async with asyncio.timeout(BOUND_S):
            await transport.start_read(second.shard, whole)
        async with side("loopback", LoopbackHub(), num_blocks=num_blocks, seed=3) as same:
            assert np.array_equal(reader.data, same.data)
