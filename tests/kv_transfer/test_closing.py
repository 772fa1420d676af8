"""The closing question: once, and only when every read has ended well."""

import asyncio
from dataclasses import dataclass, field

import pytest

from kv_transfer.closing import ClosingQuestion
from kv_transfer.messages import Close
from tests.builders import soon, until
from tests.kv_transfer.halves import pair


@dataclass
class Door:
    """Where a thread would send; `opens` says whether it can."""

    opens: bool = True
    sent: list[bytes] = field(default_factory=list)

    def send(self, frame: bytes) -> bool:
        if self.opens:
            self.sent.append(frame)
        return self.opens


def question(door: Door, reads: int) -> ClosingQuestion:
    asked = ClosingQuestion()
    asked.prepare(door, b"close")  # type: ignore[arg-type]
    for _ in range(reads):
        asked.read_begun()
    return asked


def test_the_end_of_the_last_read_asks() -> None:
    door = Door()
    q = question(door, 2)
    q.arm()
    q.read_ended()
    assert not (door.sent or q.asked)
    q.read_ended()
    assert (door.sent, q.asked, q.claim()) == ([b"close"], True, False)


def test_nothing_is_asked_while_more_reads_may_follow() -> None:
    door = Door()
    q = question(door, 1)
    q.read_ended()
    assert not (door.sent or q.asked)
    assert q.claim()


def test_a_read_that_failed_leaves_the_question_unasked() -> None:
    door = Door()
    q = question(door, 2)
    q.arm()
    q.read_ended()
    assert not q.withdraw()
    assert not door.sent


def test_a_shut_door_leaves_the_question_to_the_event_loop() -> None:
    q = question(Door(opens=False), 1)
    q.arm()
    q.read_ended()
    assert not q.asked
    assert q.claim()
    assert q.asked


def test_a_question_withdrawn_is_not_asked_by_a_read_that_ends_later() -> None:
    door = Door()
    q = question(door, 1)
    q.arm()
    assert not q.withdraw()
    q.read_ended()
    assert not (door.sent or q.asked)


def test_a_question_the_event_loop_asks_is_not_asked_by_a_thread() -> None:
    door = Door()
    q = question(door, 1)
    q.arm()
    assert q.claim()
    q.read_ended()
    assert not door.sent


# -- in a hand-off ------------------------------------------------------------------------------


async def test_the_owner_is_asked_before_the_event_loop_hears_that_the_read_has_ended() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(3)
        p.half.transport.early = True
        p.half.transport.holds = True
        pulling = asyncio.create_task(p.pull(lease, 3))
        await until(lambda: p.owner.table.counters.closed == 1, "the lease was closed")
        assert not pulling.done()
        p.half.transport.let_go()
        p.assert_arrived(await soon(pulling), blocks)
        assert sum(isinstance(message, Close) for message in p.owner.owner.heard) == 1


@pytest.mark.parametrize("final_alone", [False, True])
async def test_of_a_streamed_prefill_only_the_last_read_asks(final_alone: bool) -> None:
    async with pair() as p:
        lease, blocks = p.owner.open(4)
        p.half.transport.early = True
        p.half.transport.holds = True
        pulling = asyncio.create_task(p.pull(lease, 4))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks if final_alone else blocks[:2])
        await until(lambda: p.half.transport.waiting == 1, "the first read runs")
        assert not any(isinstance(message, Close) for message in p.owner.owner.heard)
        p.owner.owner.finish(lease, [] if final_alone else blocks[2:], (7,), ended=False)
        if not final_alone:
            await until(lambda: p.owner.table.counters.closed == 1, "the lease was closed")
        p.half.transport.let_go()
        p.assert_arrived(await soon(pulling), blocks)
        assert sum(isinstance(message, Close) for message in p.owner.owner.heard) == 1


async def test_checksums_are_asked_for_by_the_event_loop() -> None:
    async with pair(verify="all") as p:
        lease, blocks = p.owner.whole(3)
        p.half.transport.early = True
        p.half.transport.holds = True
        pulling = asyncio.create_task(p.pull(lease, 3))
        await until(lambda: p.half.transport.waiting == 1, "the read runs")
        for _ in range(20):
            await asyncio.sleep(0)
        assert p.owner.table.counters.closed == 0
        p.half.transport.let_go()
        p.assert_arrived(await soon(pulling), blocks)
