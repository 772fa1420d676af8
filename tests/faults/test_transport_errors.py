"""A transport that fails at each of its calls, damages what it brings, or comes to no end."""

import pytest

from tests.faults.fault import Fault
from tests.faults.rig import FOUR, VISIBLE_S, Rig, Shape, failures
from tests.faults.soak import Row, soak
from tests.faults.zygote import Zygote

LONE_OWNER = Shape(workers=("p0", "d0", "d1"))

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]


def read_fails(fault: Fault, *, cause: str = "read_failed", shape: Shape = FOUR) -> Row:
    """One read of each hand-off fails or brings something else; all retries are right."""

    async def run(rig: Rig, count: int) -> None:
        reader = rig.workers["d0"]
        before = failures(await reader.stats()).get(cause, 0)
        for _ in range(count):
            await reader.arm(fault, 1)
            (answer,) = await rig.answers(1)
            await reader.hit(fault, 1)
            assert len(answer.attempts) == 2, answer
        assert failures(await reader.stats()).get(cause, 0) == before + count
        await rig.free(VISIBLE_S)

    return Row(run=run, wave=10, shape=shape)


async def connect_fails(rig: Rig, count: int) -> None:
    """First contact fails for some, then succeeds; then the connection is broken again."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    await owner.arm(Fault.STREAM_BROKEN, 1)
    await rig.answers(1)
    await owner.arm(Fault.STREAM_BROKEN, 0)
    await reader.arm(Fault.CONNECT_FAILS, 1)
    failed = await rig.answers(count)
    await reader.hit(Fault.CONNECT_FAILS, 1)
    assert any(len(answer.attempts) > 1 for answer in failed)
    again = await rig.answers(1)
    assert again[0].attempts == ("ok",)
    await rig.free(VISIBLE_S)


async def disconnect_fails(rig: Rig, count: int) -> None:
    """The owner has a new life, and what was prepared for the old one cannot be given back."""
    reader = rig.workers["d0"]
    await rig.answers(1)
    await reader.arm(Fault.DISCONNECT_FAILS, 1)
    dead = await rig.kill("p0")
    await rig.start("p0", ports=dead.ports)
    await rig.answers(count)
    await reader.hit(Fault.DISCONNECT_FAILS, 1)
    again = await rig.answers(1)
    assert again[0].attempts == ("ok",)
    await rig.free(VISIBLE_S)


async def read_stays_in_progress(rig: Rig, count: int) -> None:
    """Given up by its request; its blocks wait for it, and are whole when it ends at last."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count) as asked:
        await reader.hit(Fault.IN_READ, count)
        for one in asked:
            await one.answer
        await rig.free(VISIBLE_S, ["p0", "p1", "d1"])
        reply = await reader.stats()
        assert (reply.open_legs, reply.blocks_in_use, reply.blocks_receiving) == (0, 0, 0)
        assert reply.blocks_quarantined > 0
        await rig.crowd("d0")
        await reader.go(Fault.IN_READ)
    await rig.free(VISIBLE_S)
    assert owner.hits == {}


ROWS = {
    "connect_fails": Row(run=connect_fails),
    "start_read_raises": read_fails(Fault.READ_RAISES),
    "read_fails_at_once": read_fails(Fault.READ_FAILS_AT_ONCE),
    "read_fails_later": read_fails(Fault.READ_FAILS_LATER),
    "disconnect_fails": Row(run=disconnect_fails, shape=LONE_OWNER),
    "read_stays_in_progress": Row(run=read_stays_in_progress, wave=5),
    "byte_flipped": read_fails(Fault.BYTE_FLIPPED, cause="checksum", shape=Shape(verify="all")),
}


@pytest.mark.parametrize("row", ROWS)
async def test_another_worker_answers(zygote: Zygote, repeats: int, row: str) -> None:
    await soak(zygote, ROWS[row], repeats)
