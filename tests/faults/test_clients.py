"""Clients that leave at every moment, and more at once than the memory holds."""

import asyncio
from asyncio import FIRST_COMPLETED
from random import Random

import pytest

from core.errors import DeadlineExceeded
from tests.faults.fault import Fault
from tests.faults.handle import WAIT_S
from tests.faults.rig import BLOCK_TOKENS, VISIBLE_S, Asked, Rig, Shape, is_free
from tests.faults.soak import Row, soak
from tests.faults.zygote import Zygote

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

PAIR = ("p0", "d0")


async def leaves_before_the_prefill(rig: Rig, count: int) -> None:
    """The engine is busy with another prompt; that one is answered."""
    owner = rig.workers["p0"]
    await owner.arm(Fault.IN_STEP, 1)
    async with rig.asking(1):
        await owner.hit(Fault.IN_STEP, 1)
        async with rig.asking(count) as asked:
            await rig.holds(WAIT_S, [owner], lambda r: r.open_legs == 1 + count, "asked")
            leave(asked)
            await rig.holds(VISIBLE_S, [owner], lambda r: r.open_legs == 1, "left")
        await owner.go(Fault.IN_STEP)
    await rig.free(VISIBLE_S)


async def leaves_during_the_prefill(rig: Rig, count: int) -> None:
    """The engine is inside one of its steps; its blocks are given back when that has ended."""
    owner = rig.workers["p0"]
    await owner.arm(Fault.IN_STEP, 1)
    async with rig.asking(count) as asked:
        await owner.hit(Fault.IN_STEP, 1)
        await rig.holds(WAIT_S, [owner], lambda r: r.open_legs == count, "asked")
        leave(asked)
        await rig.holds(VISIBLE_S, [owner], lambda r: r.open_legs == 0, "left")
        await owner.go(Fault.IN_STEP)
    await rig.free(VISIBLE_S)


async def leaves_between_the_legs(rig: Rig, count: int) -> None:
    """The client has its first token, the KV is leased, and its reader has not said a word."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    await reader.arm(Fault.BEFORE_BIND, count)
    async with rig.asking(count) as asked:
        await reader.hit(Fault.BEFORE_BIND, count)
        await rig.until(lambda: all(one.seen == 1 for one in asked), "first tokens")
        leave(asked)
        await rig.holds(VISIBLE_S, [owner, reader], is_free, "free")
        await reader.go(Fault.BEFORE_BIND)
    await rig.free(VISIBLE_S)


async def leaves_during_the_read(rig: Rig, count: int) -> None:
    """The owner is free at once, the reader when its reads have ended."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count) as asked:
        await reader.hit(Fault.IN_READ, count)
        leave(asked)
        await rig.holds(VISIBLE_S, [owner], is_free, "free")
        await rig.holds(VISIBLE_S, [reader], lambda r: r.open_legs == 0, "left")
        assert (await reader.stats()).blocks_quarantined > 0
        await reader.go(Fault.IN_READ)
    await rig.free(VISIBLE_S)


async def leaves_during_the_decode(rig: Rig, count: int) -> None:
    """The engine is inside one of its steps."""
    reader = rig.workers["d0"]
    async with rig.asking(count, max_tokens=200) as asked:
        await rig.until(lambda: all(one.seen > 1 for one in asked), "decoded tokens")
        await reader.arm(Fault.IN_STEP, 1)
        await reader.hit(Fault.IN_STEP, 1)
        leave(asked)
        await rig.holds(VISIBLE_S, [reader], lambda r: r.open_legs == 0, "left")
        await reader.go(Fault.IN_STEP)
    await rig.free(VISIBLE_S)


def leave(asked: list[Asked]) -> None:
    """All of these clients go away."""
    for one in asked:
        one.leave()


async def deadline_passes_during_the_read(rig: Rig, count: int) -> None:
    """A clear error, in time; the read may end when it likes."""
    reader = rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    asked = [rig.ask(rig.request(deadline_s=0.3)) for _ in range(count)]
    for answer in await asyncio.gather(*(one.answer for one in asked)):
        assert isinstance(answer.error, DeadlineExceeded), answer
    await rig.free(VISIBLE_S, ["p0", "p1", "d1"])
    await reader.go(Fault.IN_READ)
    await reader.arm(Fault.IN_READ, 0)
    await rig.free(VISIBLE_S)


async def reader_out_of_blocks(rig: Rig, count: int) -> None:
    """One answer fills the reader. The rest wait for memory, holding none; those whose time is up
    meanwhile end with a clear error, the others are answered when it goes.
    """
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    whole = rig.shape.num_blocks * BLOCK_TOKENS
    async with rig.asking(1, prompt_tokens=whole - 12 * BLOCK_TOKENS, max_tokens=20):
        await rig.holds(5.0, [reader], lambda r: r.load.running == 1, "full")
        await reader.arm(Fault.IN_STEP, 1)
        await reader.hit(Fault.IN_STEP, 1)
        hasty = [rig.ask(rig.request(deadline_s=0.2)) for _ in range(2)]
        async with rig.asking(count) as patient:
            for answer in await asyncio.gather(*(one.answer for one in hasty)):
                assert isinstance(answer.error, DeadlineExceeded), answer
            await rig.holds(VISIBLE_S, [reader], lambda r: r.open_legs == 1 + count, "left")
            assert (await reader.stats()).blocks_receiving == 0
            assert not any(one.answer.done() for one in patient)
            await reader.go(Fault.IN_STEP)
    await rig.free(VISIBLE_S)
    assert owner.hits == {}


async def two_prompts_exceed_the_arena(rig: Rig, count: int) -> None:
    """Each fits alone. Neither waits for the other for ever, on either side."""
    whole = rig.shape.num_blocks * BLOCK_TOKENS
    for _ in range(count):
        await rig.answers(2, prompt_tokens=whole * 5 // 8, max_tokens=8)
    await rig.free(VISIBLE_S)


async def a_fifth_of_five_hundred_leaves(rig: Rig, count: int) -> None:
    """Any that is under way, one after every fourth answer; all the others have the right text.
    `count` repeats are one crowd.
    """
    random = Random(rig.requests)
    asked = [
        rig.ask(rig.request(prompt_tokens=n, max_tokens=random.choice([1, 4, 24])))
        for n in random.choices([20, 60, 200, 500], k=500)
    ]
    left: list[Asked] = []
    under_way = list(asked)
    while len(left) < 100:
        under_way = [one for one in under_way if not one.answer.done()]
        answered = len(asked) - len(under_way) - len(left)
        if answered < 4 * len(left):
            waiting = [one.answer for one in under_way]
            done, _ = await asyncio.wait(waiting, timeout=60.0, return_when=FIRST_COMPLETED)
            assert done, f"stuck after {answered} answers"
            continue
        left.append(under_way.pop(random.randrange(len(under_way))))
        leave(left[-1:])
    await asyncio.wait([one.answer for one in asked], timeout=60.0)
    assert all(one.answer.cancelled() for one in left)
    stayed = [one for one in asked if not one.answer.cancelled()]
    assert len(stayed) == 400
    for one in stayed:
        rig.assert_right(one.answer.result())
    await rig.free(VISIBLE_S)


ROWS = {
    "leaves_before_the_prefill": Row(run=leaves_before_the_prefill, wave=10),
    "leaves_during_the_prefill": Row(run=leaves_during_the_prefill, wave=10),
    "leaves_between_the_legs": Row(run=leaves_between_the_legs, wave=10),
    "leaves_during_the_read": Row(run=leaves_during_the_read, wave=10),
    "leaves_during_the_decode": Row(run=leaves_during_the_decode, wave=10),
    "deadline_passes_during_the_read": Row(run=deadline_passes_during_the_read, wave=10),
    "reader_out_of_blocks": Row(run=reader_out_of_blocks, wave=10, shape=Shape(workers=PAIR)),
    "two_prompts_exceed_the_arena": Row(
        run=two_prompts_exceed_the_arena, wave=10, shape=Shape(workers=PAIR)
    ),
    "a_fifth_of_five_hundred_leaves": Row(
        run=a_fifth_of_five_hundred_leaves, wave=50, shape=Shape(num_blocks=4096)
    ),
}


@pytest.mark.parametrize("row", ROWS)
async def test_nothing_is_left_of_them(zygote: Zygote, repeats: int, row: str) -> None:
    await soak(zygote, ROWS[row], repeats)
