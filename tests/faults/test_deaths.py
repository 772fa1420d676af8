"""Workers that are killed, restarted or hang, before, during and after the read."""

import asyncio
import time
from dataclasses import replace

import pytest

from core.errors import DeadlineExceeded, Unavailable
from tests.faults.fault import Fault
from tests.faults.forged import decode_leg, prefilled
from tests.faults.rig import HIDDEN_S, VISIBLE_S, Rig, Shape, is_free
from tests.faults.soak import Row, soak
from tests.faults.zygote import Zygote

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

VISIBLE = Shape(lease_s=60.0)
"""What is seen at once is not left to the lease."""
TCP = replace(VISIBLE, tcp=True)
LONE_OWNER = Shape(workers=("p0", "d0", "d1"))
NO_OTHER_S = 1.5
PAIR = Shape(workers=("p0", "d0"))
HANGING = Shape(silence_s=2.5, num_blocks=512)
"""The router notices later than the lease does."""


def reader_killed(gate: Fault, shape: Shape = VISIBLE) -> Row:
    """The reader dies at this point of a hand-off; owner and router see it."""

    async def run(rig: Rig, count: int) -> None:
        await rig.workers["d0"].arm(gate, count)
        async with rig.asking(count):
            await rig.workers["d0"].hit(gate, count)
            await rig.kill("d0")
        await rig.free(VISIBLE_S)
        await rig.start("d0")

    return Row(run=run, shape=shape)


async def reader_killed_and_no_router_says_so(rig: Rig, count: int) -> None:
    """The owner sees by itself that its reader is gone."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    for _ in range(count):
        await reader.arm(Fault.IN_READ, 1)
        async with prefilled(rig, "p0") as (request, sequence_id, handoff):
            leg = asyncio.create_task(decode_leg(rig, "d0", request, sequence_id, handoff))
            await reader.hit(Fault.IN_READ, 1)
            await rig.kill("d0")
            await rig.holds(VISIBLE_S, [owner], lambda r: r.blocks_held == 0, "let go")
            leg.cancel()
        await rig.start("d0")
        reader = rig.workers["d0"]
    await rig.free(VISIBLE_S)


def owner_killed(gate: Fault, shape: Shape = VISIBLE) -> Row:
    """The owner dies; what the reader has or still gets of it must never be used."""

    async def run(rig: Rig, count: int) -> None:
        reader = rig.workers["d0"]
        await reader.arm(gate, count)
        async with rig.asking(count):
            await reader.hit(gate, count)
            await rig.kill("p0")
            await reader.go(gate)
        await rig.free(VISIBLE_S)
        await rig.start("p0")

    return Row(run=run, shape=shape)


async def owner_killed_while_its_reader_decodes(rig: Rig, count: int) -> None:
    """The lease is closed: the owner's death is nobody's loss."""
    reader = rig.workers["d0"]
    async with rig.asking(count, max_tokens=100) as asked:
        await rig.until(lambda: all(one.seen > 1 for one in asked), "decoded tokens")
        await reader.arm(Fault.IN_STEP, 1)
        await reader.hit(Fault.IN_STEP, 1)
        await rig.kill("p0")
        await reader.go(Fault.IN_STEP)
    assert [one.answer.result().attempts for one in asked] == [("ok",)] * count
    await rig.free(VISIBLE_S)
    await rig.start("p0")


async def owner_restarted_on_its_port(rig: Rig, count: int) -> None:
    """There is no other owner: the retry meets the new life at the old address."""
    reader = rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count) as asked:
        await reader.hit(Fault.IN_READ, count)
        dead = await rig.kill("p0")
        await rig.start("p0", ports=dead.ports)
        await reader.go(Fault.IN_READ)
    assert all(len(one.answer.result().attempts) > 1 for one in asked)
    await rig.free(VISIBLE_S)


async def owner_killed_and_there_is_no_other(rig: Rig, count: int) -> None:
    """A clear error within the deadline; the reader is free long before."""
    reader = rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    asked = [rig.ask(rig.request(deadline_s=NO_OTHER_S)) for _ in range(count)]
    await reader.hit(Fault.IN_READ, count)
    began_s = time.monotonic()
    await rig.kill("p0")
    await reader.go(Fault.IN_READ)
    await rig.free(VISIBLE_S)
    for one in asked:
        answer = await one.answer
        assert isinstance(answer.error, Unavailable | DeadlineExceeded), answer
    assert time.monotonic() - began_s < NO_OTHER_S + 0.5
    await rig.start("p0")


async def reader_hangs(rig: Rig, count: int) -> None:
    """In mid-read and past its lease. The owner is free while it still hangs."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count) as asked:
        await reader.hit(Fault.IN_READ, count)
        reader.stop()
        try:
            await rig.holds(HIDDEN_S, [owner], lambda r: r.blocks_held == 0, "let go")
            await asyncio.wait([one.answer for one in asked])
        finally:
            reader.resume()
        await reader.go(Fault.IN_READ)
    await rig.back("d0")
    await rig.free(VISIBLE_S)
    await rig.answers(1)


def owner_hangs(shape: Shape, *, may_end: bool = False) -> Row:
    """In mid-read and past its lease. The reader is free while it still hangs.

    Over TCP the owner's UCX answers each read itself. One that finds, when it goes on, that the
    reader's end of many is gone ends its process ("ucp_request.inl: Fatal: unexpected error:
    Endpoint timeout", UCX of NIXL 1.5.1), which is out of our hands.
    """

    async def run(rig: Rig, count: int) -> None:
        owner, reader = rig.workers["p0"], rig.workers["d0"]
        await reader.arm(Fault.IN_READ, count)
        async with rig.asking(count) as asked:
            await reader.hit(Fault.IN_READ, count)
            owner.stop()
            try:
                await reader.go(Fault.IN_READ)
                limit_s = HIDDEN_S + shape.read_timeout_s
                await rig.holds(limit_s, [reader], is_free, "free")
                await asyncio.wait([one.answer for one in asked])
            finally:
                owner.resume()
        await rig.back("p0", may_end=may_end)
        await rig.free(VISIBLE_S)
        await rig.answers(1)

    return Row(run=run, wave=20, shape=shape)


ROWS = {
    "reader_killed_before_the_read": reader_killed(Fault.BEFORE_READ),
    "reader_killed_during_the_read": reader_killed(Fault.IN_READ),
    "reader_killed_during_a_tcp_read": reader_killed(Fault.IN_READ, TCP),
    "reader_killed_after_the_read": reader_killed(Fault.AFTER_READ),
    "reader_killed_while_it_decodes": reader_killed(Fault.IN_STEP),
    "reader_killed_and_no_router_says_so": Row(
        run=reader_killed_and_no_router_says_so, wave=5, shape=VISIBLE
    ),
    "owner_killed_before_the_read": owner_killed(Fault.BEFORE_READ),
    "owner_killed_during_the_read": owner_killed(Fault.IN_READ),
    "owner_killed_during_a_tcp_read": owner_killed(Fault.IN_READ, TCP),
    "owner_killed_after_the_read": owner_killed(Fault.AFTER_READ),
    "owner_killed_while_its_reader_decodes": Row(run=owner_killed_while_its_reader_decodes),
    "owner_restarted_on_its_port": Row(run=owner_restarted_on_its_port, shape=LONE_OWNER),
    "owner_killed_and_there_is_no_other": Row(
        run=owner_killed_and_there_is_no_other, wave=10, shape=PAIR
    ),
    "reader_hangs": Row(run=reader_hangs, wave=20, shape=HANGING),
    "owner_hangs": owner_hangs(HANGING),
    "owner_hangs_in_a_tcp_read": owner_hangs(replace(HANGING, tcp=True), may_end=True),
}


@pytest.mark.parametrize("row", ROWS)
async def test_the_survivors_go_on(zygote: Zygote, repeats: int, row: str) -> None:
    await soak(zygote, ROWS[row], repeats)
