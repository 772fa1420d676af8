"""A transport that fails at each of its calls, damages what it brings, or comes to no end."""

import pytest

from kv_transfer.transports import CLOSE_TIMEOUT_S
from tests.faults.fault import Fault
from tests.faults.rig import FOUR, VISIBLE_S, Rig, Shape, failures
from tests.faults.soak import Row, soak
from tests.faults.zygote import Zygote

ENDS_S = 5.0
"""By then a worker that cannot go on, or was told to stop, has ended."""
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


def disconnect_fails(fault: Fault) -> Row:
    """The owner has a new life, and what was prepared for the old one cannot be given back."""

    async def run(rig: Rig, count: int) -> None:
        reader = rig.workers["d0"]
        await rig.answers(1)
        await reader.arm(fault, 1)
        dead = await rig.kill("p0")
        await rig.start("p0", ports=dead.ports)
        await rig.answers(count)
        await reader.hit(fault, 1)
        again = await rig.answers(1)
        assert again[0].attempts == ("ok",)
        await rig.free(VISIBLE_S)

    return Row(run=run, shape=LONE_OWNER)


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


def memory_raises(name: str, *attempts: str) -> Row:
    """A hello of this worker cannot say how its arena is read: of a reader's nobody needs it."""

    async def run(rig: Rig, count: int) -> None:
        owner, faulty = rig.workers["p0"], rig.workers[name]
        before = failures(await rig.workers["d0"].stats()).get("no_transport", 0)
        for _ in range(count):
            await owner.arm(Fault.STREAM_BROKEN, 1)
            await rig.answers(1)
            await owner.arm(Fault.STREAM_BROKEN, 0)
            await faulty.arm(Fault.MEMORY_RAISES, 1)
            (answer,) = await rig.answers(1)
            await faulty.hit(Fault.MEMORY_RAISES, 1)
            assert answer.attempts == attempts, answer
            (again,) = await rig.answers(1)
            assert again.attempts == ("ok",), again
        after = failures(await rig.workers["d0"].stats()).get("no_transport", 0)
        assert after == before + count * (len(attempts) - 1)
        await rig.free(VISIBLE_S)

    return Row(run=run, wave=10)


def transport_ends(name: str, fault: Fault) -> Row:
    """In mid-read. The worker ends with its only transport, and the others go on."""

    async def run(rig: Rig, count: int) -> None:
        reader, faulty = rig.workers["d0"], rig.workers[name]
        await reader.arm(Fault.IN_READ, count)
        async with rig.asking(count):
            await reader.hit(Fault.IN_READ, count)
            await faulty.arm(fault, 1)
            await faulty.hit(fault, 1)
            await reader.go(Fault.IN_READ)
            await faulty.ends(ENDS_S)
            assert "the KV transport failed: injected by a test" in faulty.tail(), faulty.tail()
            await rig.kill(name)
        await rig.free(VISIBLE_S)
        await rig.start(name)

    return Row(run=run, wave=5)


def close_fails(fault: Fault, says: str, within_s: float) -> Row:
    """A worker that is told to stop does so all the same, and closes the rest of it. Once for each
    wave: a close that hangs is waited for.
    """

    async def run(rig: Rig, _count: int) -> None:
        faulty = rig.workers["d0"]
        await rig.answers(1)
        await faulty.arm(fault, 1)
        faulty.stop_serving()
        await rig.answers(1)
        await faulty.ends(within_s)
        assert says in faulty.tail(), faulty.tail()
        assert "engine_closed" in faulty.tail(), faulty.tail()
        await rig.kill("d0")
        await rig.free(VISIBLE_S)
        await rig.start("d0")

    return Row(run=run, wave=50)


ROWS = {
    "memory_raises_at_the_owner": memory_raises("p0", "kv_transfer_failed", "ok"),
    "memory_raises_at_the_reader": memory_raises("d0", "ok"),
    "connect_fails": Row(run=connect_fails),
    "start_read_raises": read_fails(Fault.READ_RAISES),
    "read_fails_at_once": read_fails(Fault.READ_FAILS_AT_ONCE),
    "read_fails_later": read_fails(Fault.READ_FAILS_LATER),
    "disconnect_fails": disconnect_fails(Fault.DISCONNECT_FAILS),
    "disconnect_raises": disconnect_fails(Fault.DISCONNECT_RAISES),
    "failed_at_the_reader": transport_ends("d0", Fault.TRANSPORT_FAILS),
    "failed_at_the_owner": transport_ends("p0", Fault.TRANSPORT_FAILS),
    "failed_raises": transport_ends("d0", Fault.FAILED_RAISES),
    "close_raises": close_fails(Fault.CLOSE_RAISES, "transport_bug name=nixl", ENDS_S),
    "close_hangs": close_fails(
        Fault.CLOSE_HANGS, "transport_not_closed name=nixl", CLOSE_TIMEOUT_S + ENDS_S
    ),
    "read_stays_in_progress": Row(run=read_stays_in_progress, wave=5),
    "byte_flipped": read_fails(Fault.BYTE_FLIPPED, cause="checksum", shape=Shape(verify="all")),
}


@pytest.mark.parametrize("row", ROWS)
async def test_another_worker_answers(zygote: Zygote, repeats: int, row: str) -> None:
    await soak(zygote, ROWS[row], repeats)
