"""Pulling a cached prefix from whoever has it."""

import asyncio
from dataclasses import replace

import pytest

from core.errors import DeadlineExceeded, TransferCause, TransferFailed
from kv_transfer.messages import Abort, Fetched
from kv_transfer.metrics import LeaseEnd
from tests.builders import until
from tests.kv_transfer.halves import LAYOUT, LEASE_S, NUM_BLOCKS, cache, pair


async def test_a_cached_prefix_is_read_and_its_lease_closed() -> None:
    async with pair() as p:
        blocks = cache(p.owner.pool, 6)
        fetched = await p.fetch(6)
        assert (fetched.cached_blocks, len(fetched.blocks)) == (0, 6)
        assert fetched.stats.nbytes == 6 * LAYOUT.block_bytes
        p.assert_arrived(fetched, blocks)
        await p.owner_holds_nothing()
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1
        assert p.owner.pool.counts().cached == 6


async def test_only_what_is_missing_is_read() -> None:
    async with pair() as p:
        blocks = cache(p.owner.pool, 6)
        cache(p.half.pool, 2)
        fetched = await p.fetch(6)
        assert fetched.cached_blocks == 2
        assert fetched.stats.nbytes == 4 * LAYOUT.block_bytes
        p.assert_arrived(fetched, blocks[2:])


async def test_a_source_that_has_less_gives_what_it_has() -> None:
    async with pair() as p:
        blocks = cache(p.owner.pool, 3)
        fetched = await p.fetch(6)
        assert len(fetched.blocks) == 3
        p.assert_arrived(fetched, blocks)


@pytest.mark.parametrize("held", [0, 2])
async def test_a_source_that_has_no_more_says_so(held: int) -> None:
    async with pair() as p:
        cache(p.owner.pool, held)
        cache(p.half.pool, 2)
        with pytest.raises(TransferFailed) as caught:
            await p.fetch(6)
        assert caught.value.cause is TransferCause.NOT_HELD
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()
        assert p.reader.metrics.pair(p.owner.hello.worker_id).failures == {"not_held": 1}


async def test_more_than_was_asked_for_is_not_taken() -> None:
    async with pair() as p:
        cache(p.owner.pool, 4)
        cache(p.half.pool, 1)
        more = p.owner.pool.allocate(3) or []
        p.owner.owner.says = lambda message: [
            replace(message, block_ids=(*message.block_ids, *more))
            if isinstance(message, Fetched)
            else message
        ]
        with pytest.raises(TransferFailed) as caught:
            await p.fetch(4)
        assert caught.value.cause is TransferCause.OTHER_PROTOCOL
        assert p.half.pool.counts().cached == 1
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_a_fetch_never_waits_for_memory() -> None:
    async with pair() as p:
        cache(p.owner.pool, 6)
        taken = p.half.pool.allocate(NUM_BLOCKS - 5) or []
        with pytest.raises(TransferFailed) as caught:
            await p.fetch(6)
        assert caught.value.cause is TransferCause.NO_MEMORY
        p.half.pool.release(taken)
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_what_expires_in_mid_read_is_not_used() -> None:
    async with pair() as p:
        cache(p.owner.pool, 4)
        p.half.transport.holds = True
        fetching = asyncio.create_task(p.fetch(4))
        await until(lambda: p.half.transport.waiting == 1)
        p.owner.clock.advance(LEASE_S)
        p.owner.owner.sweep()
        with pytest.raises(TransferFailed) as caught:
            await fetching
        assert caught.value.cause is TransferCause.EXPIRED
        assert p.half.pool.counts().quarantined == 4
        p.half.transport.let_go()
        await until(lambda: p.half.pool.counts().quarantined == 0)
        p.assert_reader_holds_nothing()


async def test_an_answer_that_comes_after_the_fetch_was_given_up_ends_its_lease() -> None:
    async with pair() as p:
        cache(p.owner.pool, 4)
        late: list[Fetched] = []

        def hold(message: object) -> list:  # type: ignore[type-arg]
            if isinstance(message, Fetched):
                late.append(message)
                return []
            return [message]

        p.owner.owner.says = hold
        with pytest.raises(DeadlineExceeded):
            await p.fetch(4, timeout_s=0.1)
        assert p.owner.pool.counts().held == 4
        p.owner.owner.says = lambda message: [message]
        (reader,) = p.owner.owner._readers
        p.owner.owner._readers[reader](late[0])
        await p.owner_holds_nothing()
        assert any(isinstance(message, Abort) for message in p.owner.owner.heard)
