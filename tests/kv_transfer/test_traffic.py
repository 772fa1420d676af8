"""What is slow beside much else is not what never ends."""

import asyncio

import pytest

from kv_transfer import traffic
from kv_transfer.traffic import Traffic, patience_s
from tests.builders import soon, until
from tests.kv_transfer.halves import LAYOUT, failure, pair

TIMEOUT_S = 0.05
BLOCKS = 3
BYTES = BLOCKS * LAYOUT.block_bytes


def test_a_share_knows_the_most_that_was_beside_it() -> None:
    road = Traffic()
    first = road.begin(10)
    second = road.begin(20)
    road.end(second)
    third = road.begin(5)
    assert (first.beside, second.beside, third.beside) == (30, 30, 15)
    road.end(first)
    road.end(third)
    assert road.begin(1).beside == 1


def test_patience_is_the_timeout_and_more_for_each_byte() -> None:
    assert patience_s(3.0, 0) == 3.0
    assert patience_s(3.0, 2 << 20) - 3.0 == pytest.approx(2 * (patience_s(3.0, 1 << 20) - 3.0))


async def test_a_pull_beside_another_is_not_given_up_for_being_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traffic, "_SLOWEST_BYTES_PER_S", 100 * BYTES)
    async with pair(read_timeout_s=TIMEOUT_S) as p, asyncio.TaskGroup() as group:
        p.half.transport.holds = True
        first, blocks = p.owner.whole(BLOCKS)
        slow = group.create_task(p.pull(first, BLOCKS))
        await until(lambda: p.half.transport.waiting == 1, "the first read")
        monkeypatch.setattr(traffic, "_SLOWEST_BYTES_PER_S", BYTES)
        second, _ = p.owner.whole(BLOCKS)
        other = group.create_task(p.pull(second, BLOCKS))
        await until(lambda: p.half.transport.waiting == 2, "the second read")
        await asyncio.sleep(3 * TIMEOUT_S)
        assert not slow.done()
        p.half.transport.let_go()
        p.half.pool.release((await soon(other)).blocks)  # type: ignore[attr-defined]
        p.assert_arrived(await slow, blocks)


async def test_a_pull_beside_another_that_never_ends_is_given_up_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(traffic, "_SLOWEST_BYTES_PER_S", 100 * BYTES)
    async with pair(read_timeout_s=TIMEOUT_S) as p:
        p.half.transport.holds = True
        pulls = [p.pull(p.owner.whole(BLOCKS)[0], BLOCKS) for _ in range(2)]
        for said in await soon(asyncio.gather(*map(failure, pulls))):  # type: ignore[attr-defined]
            assert "did not end in time" in said
        p.half.transport.let_go()
        await asyncio.sleep(0)
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()
