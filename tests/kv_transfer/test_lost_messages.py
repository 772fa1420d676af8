"""Messages of a hand-off that are doubled, out of order or lost: it ends well all the same."""

import asyncio
from collections.abc import Callable

import pytest

from kv_transfer.messages import Announce, Bind, Close, Closed, FromOwner, FromReader
from kv_transfer.metrics import LeaseEnd
from tests.builders import soon, until
from tests.kv_transfer.halves import LAST, NUM_BLOCKS, Pair, pair

QUICK_LEASE_S = 0.15
"""The reader asks again after a third of it."""


def lose_first(kind: type[object], where: Callable[[object], bool]) -> Callable[[object], list]:  # type: ignore[type-arg]
    """Loses one message of this kind for which `where` holds, and passes on the others."""
    lost: list[object] = []

    def pass_on(message: object) -> list[object]:
        if not lost and isinstance(message, kind) and where(message):
            lost.append(message)
            return []
        return [message]

    return pass_on


async def hand_off(p: Pair) -> None:
    """Three announcements, the last one final; the blocks must be the owner's."""
    lease, blocks = p.owner.open(5)
    async with asyncio.TaskGroup() as group:
        pulling = group.create_task(p.pull(lease, 5))
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        p.owner.owner.announce(lease, blocks[2:4])
        p.owner.owner.finish(lease, blocks[4:], LAST, ended=False)
        p.owner.pool.release(blocks)
        pulled = await pulling
    p.assert_arrived(pulled, blocks)
    assert pulled.tokens == LAST
    await p.owner_holds_nothing()
    assert p.owner.pool.counts().free == NUM_BLOCKS


@pytest.mark.parametrize("first_index", [0, 2, 4])
async def test_a_lost_announcement_is_asked_for_again(first_index: int) -> None:
    async with pair(lease_s=QUICK_LEASE_S) as p:
        p.owner.owner.says = lose_first(
            Announce, lambda m: isinstance(m, Announce) and m.first_index == first_index
        )
        await hand_off(p)


async def test_a_lost_bind_is_sent_again() -> None:
    async with pair(lease_s=QUICK_LEASE_S) as p:
        p.owner.owner.hears = lose_first(Bind, lambda _: True)
        await hand_off(p)


async def test_doubled_announcements_are_read_once() -> None:
    async with pair() as p:
        p.owner.owner.says = lambda m: [m, m] if isinstance(m, Announce) else [m]
        await hand_off(p)
        assert p.half.transport.reads <= 3


async def test_announcements_may_come_in_any_order() -> None:
    async with pair() as p:
        held: list[FromOwner] = []

        def reverse(message: FromOwner) -> list[FromOwner]:
            if not isinstance(message, Announce):
                return [message]
            held.append(message)
            return held[::-1] if message.final else []

        p.owner.owner.says = reverse
        await hand_off(p)


@pytest.mark.parametrize("lost", [Close, Closed])
async def test_a_lost_closing_question_or_answer_is_asked_again(lost: type[object]) -> None:
    async with pair(read_timeout_s=0.2, seals=False) as p:
        p.owner.owner.hears = lose_first(lost, lambda _: True)
        p.owner.owner.says = lose_first(lost, lambda _: True)
        await hand_off(p)
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1
        asked: list[FromReader] = [m for m in p.owner.owner.heard if isinstance(m, Close)]
        assert len(asked) == 2


async def test_a_lost_announcement_is_asked_for_though_others_follow() -> None:
    async with pair(lease_s=0.3) as p:
        lease, blocks = p.owner.open(12)
        p.owner.owner.says = lose_first(Announce, lambda message: message.first_index == 1)
        pulling = p.pull_soon(lease, 12)
        await until(lambda: lease.reader is not None, "the reader bound")
        for i in range(11):
            p.owner.owner.announce(lease, blocks[i : i + 1])
            await asyncio.sleep(0.03)
        assert p.half.transport.reads == 11, "the prompt is still computed, and nothing is missing"
        p.owner.owner.finish(lease, blocks[11:], LAST, ended=False)
        p.assert_arrived(await soon(pulling), blocks)
