"""Messages that are lost, doubled or late, leases that expire, and handles of another life."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from core.ids import Incarnation, LeaseId, SequenceId
from core.messages import Handoff
from tests.faults.fault import Fault
from tests.faults.forged import decode_leg, prefilled
from tests.faults.handle import WAIT_S
from tests.faults.rig import HIDDEN_S, VISIBLE_S, Rig, Shape, failures
from tests.faults.soak import Row, soak
from tests.faults.zygote import Zygote
from wire import worker_pb2

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

MANY = 1_000_000


def notice_lost(
    fault: Fault, *, times_each: int = 1, retried: bool = False, seals: bool = True
) -> Row:
    """The owner loses, doubles or delays what it says or hears, `times_each` times for each
    hand-off. All of them go well at once, or else (`retried`) none.

    Its engine waits until all are bound: what is announced later is announced in parts.
    """

    async def run(rig: Rig, count: int) -> None:
        owner = rig.workers["p0"]
        await owner.arm(fault, count * times_each, times_each)
        await owner.arm(Fault.IN_STEP, 1)
        async with rig.asking(count) as asked:
            await rig.holds(WAIT_S, [owner], lambda r: bound(r) == count, "bound")
            await owner.hit(Fault.IN_STEP, 1)
            await owner.go(Fault.IN_STEP)
        await owner.hit(fault, count * times_each)
        await owner.arm(fault, 0)
        attempts = [one.answer.result().attempts for one in asked]
        assert all((one == ("ok",)) != retried for one in attempts), attempts
        await rig.free(VISIBLE_S)

    return Row(run=run, wave=10, shape=Shape(seals=seals))


def bound(reply: worker_pb2.StatsReply) -> int:
    """Leases that a reader is bound to."""
    return sum(1 for lease in reply.leases if lease.reader)


async def lease_expires_in_mid_read(rig: Rig, count: int) -> None:
    """The reader is well, its renewals have no effect; it hears of the end and gives up."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    before = failures(await reader.stats()).get("expired", 0)
    await owner.arm(Fault.RENEWAL_WITHOUT_EFFECT, MANY)
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count):
        await reader.hit(Fault.IN_READ, count)
        await rig.holds(HIDDEN_S, [owner], lambda r: r.blocks_held == 0, "let go")
        await owner.arm(Fault.RENEWAL_WITHOUT_EFFECT, 0)
        await rig.holds(VISIBLE_S, [reader], lambda r: r.blocks_quarantined > 0, "in quarantine")
        await reader.go(Fault.IN_READ)
    await rig.free(VISIBLE_S)
    assert failures(await reader.stats())["expired"] == before + count


async def blocks_reused_under_a_stopped_reader(rig: Rig, count: int) -> None:
    """It hears nothing of the expiry; only the closing question tells it what it has read. Nothing
    else may end its reads or its legs first, however long the machine takes to fill the arena.
    """
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    before = failures(await reader.stats())
    await owner.arm(Fault.ABORT_LOST, MANY)
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count):
        await reader.hit(Fault.IN_READ, count)
        reader.stop()
        try:
            await rig.holds(HIDDEN_S, [owner], lambda r: r.blocks_held == 0, "let go")
            rig.prefer("d1")
            await rig.fill("p0")
        finally:
            rig.prefer("d0")
            reader.resume()
        await reader.go(Fault.IN_READ)
    await owner.arm(Fault.ABORT_LOST, 0)
    await rig.free(VISIBLE_S)
    after = failures(await reader.stats())
    assert sum(after.values()) == sum(before.values()) + count, (before, after)


async def stream_broken(rig: Rig, count: int) -> None:
    """Both sides live, what connects them does not."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count):
        await reader.hit(Fault.IN_READ, count)
        await owner.arm(Fault.STREAM_BROKEN, 1)
        await owner.hit(Fault.STREAM_BROKEN, 1)
        await rig.holds(VISIBLE_S, [owner], lambda r: r.blocks_held == 0, "let go")
        await reader.go(Fault.IN_READ)
    await rig.free(VISIBLE_S)


async def owner_says_nothing(rig: Rig, count: int) -> None:
    """It works, and answers its router, and no reader hears a word of it."""
    owner, reader = rig.workers["p0"], rig.workers["d0"]
    await reader.arm(Fault.IN_READ, count)
    async with rig.asking(count):
        await reader.hit(Fault.IN_READ, count)
        await owner.arm(Fault.OWNER_MUTE, MANY)
        await rig.holds(HIDDEN_S, [owner], lambda r: r.blocks_held == 0, "let go")
        await owner.arm(Fault.OWNER_MUTE, 0)
        await reader.go(Fault.IN_READ)
    await rig.free(VISIBLE_S)


Forge = Callable[[SequenceId, Handoff], tuple[SequenceId, Handoff]]


def handle_refused(forge: Forge) -> Row:
    """A decode leg with a handle that is not its own ends with a clear error, at once; the lease
    stays, for the leg it belongs to.
    """

    async def run(rig: Rig, count: int) -> None:
        for _ in range(count):
            async with prefilled(rig, "p0") as (request, sequence_id, handoff):
                other_id, other = forge(sequence_id, handoff)
                wrong = await decode_leg(rig, "d0", request, other_id, other)
                assert wrong.failed is not None, wrong
                assert wrong.failed.code == "kv_transfer_failed", wrong
                assert wrong.tokens == []
                right = await decode_leg(rig, "d0", request, sequence_id, handoff)
                assert right.failed is None, right
                assert right.tokens == rig.oracle.answer(request)[1:]
        await rig.free(VISIBLE_S)

    return Row(run=run, wave=10)


def _of(sequence_id: SequenceId, handoff: Handoff, **fields: int) -> tuple[SequenceId, Handoff]:
    return replace(sequence_id, **fields), handoff  # type: ignore[arg-type]


HANDLES: dict[str, Forge] = {
    "older_incarnation": lambda s, h: (s, replace(h, owner_incarnation=Incarnation("0" * 16))),
    "older_attempt": lambda s, h: (replace(s, attempt=s.attempt + 1), h),
    "other_choice": lambda s, h: (replace(s, choice=s.choice + 1), h),
    "unknown_lease": lambda s, h: (s, replace(h, lease_id=LeaseId(h.lease_id + 1_000))),
}


async def handle_of_another_model(rig: Rig, count: int) -> None:
    """The address of a worker that serves another model, and one of its leases."""
    stranger, peer_address = await rig.stranger()
    for _ in range(count):
        request = rig.request()
        handoff = Handoff(
            owner_id=stranger.worker_id,
            owner_address=peer_address,
            owner_incarnation=stranger.incarnation,
            lease_id=LeaseId(1),
        )
        leg = await decode_leg(rig, "d0", request, SequenceId(request.request_id), handoff)
        assert leg.failed is not None
        assert leg.failed.code == "kv_transfer_failed"
        assert "model" in leg.failed.message
    await rig.free(VISIBLE_S)


ROWS = {
    "close_lost": notice_lost(Fault.CLOSE_LOST),
    "close_lost_without_seals": notice_lost(Fault.CLOSE_LOST, seals=False),
    "closed_lost": notice_lost(Fault.CLOSED_LOST),
    "closed_lost_without_seals": notice_lost(Fault.CLOSED_LOST, seals=False),
    "closed_lost_for_good": notice_lost(Fault.CLOSED_LOST, times_each=4, retried=True, seals=False),
    "announcement_lost": notice_lost(Fault.ANNOUNCEMENT_LOST),
    "last_announcement_lost": notice_lost(Fault.LAST_ANNOUNCEMENT_LOST),
    "announcement_doubled": notice_lost(Fault.ANNOUNCEMENT_DOUBLED, times_each=3),
    "announcement_late": notice_lost(Fault.ANNOUNCEMENT_LATE),
    "lease_expires_in_mid_read": Row(
        run=lease_expires_in_mid_read, wave=10, shape=Shape(read_timeout_s=4.0)
    ),
    **{
        f"blocks_reused_under_a_stopped_reader{name}": Row(
            run=blocks_reused_under_a_stopped_reader,
            wave=5,
            shape=Shape(silence_s=60.0, read_timeout_s=60.0, deadline_s=120.0, seals=seals),
        )
        for name, seals in (("", True), ("_without_seals", False))
    },
    "stream_broken": Row(run=stream_broken, wave=10),
    "owner_says_nothing": Row(run=owner_says_nothing, wave=10),
    "handle_of_another_model": Row(run=handle_of_another_model, wave=10),
    **{f"handle_of_{name}": handle_refused(forge) for name, forge in HANDLES.items()},
}


@pytest.mark.parametrize("row", ROWS)
async def test_no_wrong_text_and_nothing_held(zygote: Zygote, repeats: int, row: str) -> None:
    await soak(zygote, ROWS[row], repeats)
