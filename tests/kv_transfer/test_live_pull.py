"""Following a running sequence: its blocks come while it runs, the last ones when it stops."""

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from core.errors import TransferCause, TransferFailed
from core.ids import BlockId
from kv_transfer.leases import Lease
from kv_transfer.messages import FromReader, LeaseOutcome, Ready
from kv_transfer.reader import Pulled
from tests.builders import until
from tests.kv_transfer.halves import LAYOUT, NUM_BLOCKS, Pair, hashes_of, pair

SIZE = LAYOUT.block_size
CONTEXT_TOKENS = 2 * SIZE + 1


@dataclass
class Running:
    """A sequence that runs at the owner: three blocks at first, one token in the third."""

    lease: Lease
    blocks: list[BlockId]
    ready: int = 0
    outcomes: list[LeaseOutcome] = field(default_factory=list)

    def on_ready(self, lease: Lease) -> None:
        assert lease is self.lease
        self.ready += 1

    def on_ended(self, lease: Lease, outcome: LeaseOutcome) -> None:
        self.outcomes.append(outcome)


def run(p: Pair, num_blocks: int = 6) -> Running:
    lease, blocks = p.owner.open(num_blocks, moves=True)
    running = Running(lease, blocks)
    lease.listener = running
    p.owner.owner.announce(lease, blocks[:2])
    return running


async def follow(p: Pair, running: Running) -> Pulled:
    handoff = replace(p.owner.handoff(running.lease), live=True)
    return await p.pull_from(handoff, 2, hashes_of(2), context_tokens=CONTEXT_TOKENS)


def stop(p: Pair, running: Running, num_tokens: int) -> tuple[int, ...]:
    """The owner stops after `num_tokens` tokens beyond the context."""
    tokens = tuple(range(100, 100 + num_tokens))
    needed = LAYOUT.num_blocks(CONTEXT_TOKENS + num_tokens - 1)
    rest = running.blocks[len(running.lease.blocks) : needed]
    p.owner.owner.finish(running.lease, rest, tokens, ended=False)
    p.owner.pool.release(running.blocks)
    return tokens


async def test_blocks_follow_while_the_sequence_runs_and_the_rest_when_it_stops() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        running = run(p)
        following = group.create_task(follow(p, running))
        await until(lambda: running.ready == 1, "ready")
        p.owner.owner.announce(running.lease, running.blocks[2:4])
        await until(lambda: p.half.transport.reads == 2, "the read of the new blocks")
        assert not following.done()
        tokens = stop(p, running, 2 * SIZE + 2)
        pulled = await following
        assert pulled.tokens == tokens
        assert len(pulled.blocks) == LAYOUT.num_blocks(CONTEXT_TOKENS + len(tokens) - 1) == 5
        p.assert_arrived(pulled, running.blocks[:5])
        await p.owner_holds_nothing()
        assert running.outcomes == [LeaseOutcome.HELD]


async def test_ready_is_not_said_while_a_read_is_under_way() -> None:
    async with pair() as p, asyncio.TaskGroup() as group:
        running = run(p)
        p.half.transport.holds = True
        following = group.create_task(follow(p, running))
        await until(lambda: p.half.transport.waiting == 1)
        assert not any(isinstance(message, Ready) for message in p.owner.owner.heard)
        p.half.transport.let_go()
        await until(lambda: running.ready == 1, "ready")
        p.half.transport.holds = False
        stop(p, running, 1)
        p.half.pool.release((await following).blocks)


async def test_without_memory_the_move_is_off_at_once_and_the_sequence_runs_on() -> None:
    async with pair() as p:
        running = run(p)
        taken = p.half.pool.allocate(NUM_BLOCKS - 1) or []
        with pytest.raises(TransferFailed) as caught:
            await follow(p, running)
        assert caught.value.cause is TransferCause.NO_MEMORY
        await p.owner_holds_nothing()
        assert running.outcomes == [LeaseOutcome.ABORTED]
        p.half.pool.release(taken)
        p.assert_reader_holds_nothing()


async def test_memory_that_runs_out_on_the_way_ends_the_move() -> None:
    async with pair() as p:
        running = run(p)
        following = asyncio.create_task(follow(p, running))
        await until(lambda: running.ready == 1, "ready")
        taken = p.half.pool.allocate(NUM_BLOCKS - 2) or []
        p.owner.owner.announce(running.lease, running.blocks[2:4])
        with pytest.raises(TransferFailed) as caught:
            await following
        assert caught.value.cause is TransferCause.NO_MEMORY
        p.half.pool.release(taken)
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_a_lost_ready_is_said_again() -> None:
    async with pair(lease_s=0.15) as p, asyncio.TaskGroup() as group:
        running = run(p)
        p.owner.owner.hears = lambda m: [] if isinstance(m, Ready) else [m]
        following = group.create_task(follow(p, running))
        await until(lambda: any(isinstance(m, Ready) for m in p.owner.owner.heard), "ready")
        p.owner.owner.hears = lambda m: [m]
        await until(lambda: running.ready == 1, "ready again")
        stop(p, running, 3)
        p.half.pool.release((await following).blocks)
        p.assert_reader_holds_nothing()


async def test_a_lost_ready_is_said_again_though_the_sequence_runs_on() -> None:
    async with pair(lease_s=0.3) as p, asyncio.TaskGroup() as group:
        running = run(p, 14)
        lost: list[FromReader] = []

        def lose_the_first(message: FromReader) -> list[FromReader]:
            if isinstance(message, Ready) and not lost:
                lost.append(message)
                return []
            return [message]

        p.owner.owner.hears = lose_the_first
        following = group.create_task(follow(p, running))
        await until(lambda: bool(lost))
        for i in range(2, 13):
            p.owner.owner.announce(running.lease, running.blocks[i : i + 1])
            await asyncio.sleep(0.03)
        assert running.ready
        following.cancel()
