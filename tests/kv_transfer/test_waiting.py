"""Pulls that wait for memory: in which order they get it, and what ends the wait of each."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kv_transfer import reader
from kv_transfer.leases import Lease
from tests.builders import soon, until
from tests.kv_transfer.halves import LEASE_S, NUM_BLOCKS, Pair, failure, pair


async def test_a_pull_waits_until_blocks_are_free() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        taken = p.half.pool.allocate(NUM_BLOCKS - 1) or []
        lease, blocks = p.owner.whole(3)
        pulling = group.create_task(p.pull(lease, 3))
        await until(lambda: p.reader.waiting_for_memory == 1, "the pull waits")
        assert lease.reader is not None
        assert not pulling.done()
        p.half.pool.release(taken)
        p.reader.space_freed()
        p.assert_arrived(await pulling, blocks)
        assert p.reader.waiting_for_memory == 0


async def test_who_waits_for_memory_is_served_in_the_order_of_coming() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        taken = p.half.pool.allocate(NUM_BLOCKS) or []
        got: list[int] = []

        async def pull(num_blocks: int) -> None:
            lease, _ = p.owner.whole(num_blocks)
            pulled = await p.pull(lease, num_blocks)
            got.append(num_blocks)
            p.half.pool.release(pulled.blocks)
            p.reader.space_freed()

        for place, num_blocks in enumerate((6, 3, 1)):
            group.create_task(pull(num_blocks))
            await until(lambda place=place: len(p.reader._line) == place + 1)  # type: ignore[misc]
        for _ in range(5):  # enough for the second, and for the third
            p.half.pool.release([taken.pop()])
            p.reader.space_freed()
            await asyncio.sleep(0.001)
            assert len(p.reader._line) == 3
        p.half.pool.release([taken.pop()])
        p.reader.space_freed()
        await until(lambda: len(got) == 3, "all pulls")
        p.half.pool.release(taken)
        assert got == [6, 3, 1]


async def test_blocks_freed_by_the_end_of_a_sequence_are_taken_without_a_recheck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "_SPACE_RECHECK_S", 1_000.0)
    async with pair() as p, asyncio.TaskGroup() as group:
        taken = p.half.pool.allocate(NUM_BLOCKS) or []
        leases = [p.owner.whole(3) for _ in range(2)]
        pulls = [group.create_task(p.pull(lease, 3)) for lease, _ in leases]
        await until(lambda: len(p.reader._line) == 2, "both wait")
        p.half.pool.release(taken)
        p.reader.space_freed()
        for pulled in await asyncio.gather(*pulls):
            p.half.pool.release(pulled.blocks)


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


@asynccontextmanager
async def second_in_line(p: Pair, mine: Pair, lease: Lease) -> AsyncIterator[asyncio.Task[str]]:
    """A pull by `mine` that waits for memory behind one of `p`, and the message it fails with."""
    taken = p.half.pool.allocate(NUM_BLOCKS) or []
    ahead, _ = p.owner.whole(3)
    first = asyncio.create_task(p.pull(ahead, 3))
    await until(lambda: len(p.reader._line) == 1, "the first waits")
    second = asyncio.create_task(failure(mine.pull(lease, 3)))
    await until(lambda: len(p.reader._line) == 2, "the second waits")
    yield second
    assert not first.done()
    assert len(p.reader._line) == 1
    p.half.pool.release(taken)
    p.half.pool.release((await first).blocks)
    p.assert_reader_holds_nothing()


async def test_a_pull_second_in_line_for_memory_hears_its_owner_abort() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(3)
        async with second_in_line(p, p, lease) as second:
            p.owner.owner.abort(lease.lease_id, "its request was cancelled")
            assert "its request was cancelled" in str(await soon(second))
        assert p.reader.metrics.pair(p.owner.hello.worker_id).failures == {"owner_ended": 1}


async def test_a_pull_second_in_line_for_memory_hears_its_stream_break() -> None:
    async with pair() as p, p.other_owner("other") as other:
        lease, _ = other.owner.whole(3)
        async with second_in_line(p, other, lease) as second:
            await other.owner.stop()
            await soon(second)
        assert p.reader.metrics.pair(other.owner.hello.worker_id).failures == {"owner_lost": 1}


async def test_a_cancelled_pull_makes_way_for_those_behind_it() -> None:
    async with pair() as p:
        taken = p.half.pool.allocate(NUM_BLOCKS - 3) or []
        leases = [p.owner.whole(num_blocks) for num_blocks in (5, 4, 3)]
        pulls = []
        for place, (lease, blocks) in enumerate(leases):
            pulls.append(asyncio.create_task(p.pull(lease, len(blocks))))
            await until(lambda place=place: len(p.reader._line) == place + 1)  # type: ignore[misc]
        pulls[1].cancel()
        pulls[0].cancel()
        pulled = await pulls[2]
        await asyncio.wait(pulls)
        assert not p.reader._line
        p.half.pool.release([*taken, *pulled.blocks])
        p.assert_reader_holds_nothing()
