"""A row must fail where its protection is taken away, or it proves nothing."""

from dataclasses import dataclass, replace

import pytest

from tests.faults import test_deaths, test_leases, test_transport_errors
from tests.faults.fault import Fault
from tests.faults.rig import Rig, Shape
from tests.faults.soak import LEAKS_FROM, Row, soak
from tests.faults.zygote import Zygote

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

MANY = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A row, what is taken from which worker, and how the row must fail."""

    row: Row
    worker: str
    taken: Fault
    fails_with: str
    repeats: int = 1

    def weakened(self) -> Row:
        async def run(rig: Rig, count: int) -> None:
            await rig.workers[self.worker].arm(self.taken, MANY)
            await self.row.run(rig, count)

        return replace(self.row, run=run, wave=min(self.row.wave, self.repeats))


async def plain(rig: Rig, count: int) -> None:
    """No fault at all."""
    await rig.answers(count)
    await rig.free()


CONTROLS = {
    "a_closing_question_that_is_always_answered_yes": Control(
        row=test_leases.ROWS["blocks_reused_under_a_stopped_reader_without_seals"],
        worker="p0",
        taken=Fault.ALWAYS_HELD,
        fails_with="kv_mismatch",
        repeats=5,
    ),
    "a_seal_that_is_not_broken": Control(
        row=test_leases.ROWS["blocks_reused_under_a_stopped_reader"],
        worker="p0",
        taken=Fault.SEALS_STAY,
        fails_with="kv_mismatch",
        repeats=5,
    ),
    "no_quarantine": Control(
        row=test_transport_errors.ROWS["read_stays_in_progress"],
        worker="d0",
        taken=Fault.NO_QUARANTINE,
        fails_with="quarantined",
        repeats=5,
    ),
    "no_fence": Control(
        row=test_leases.ROWS["handle_of_older_attempt"],
        worker="p0",
        taken=Fault.NO_FENCE,
        fails_with="failed=None",
    ),
    "leases_of_the_lost": Control(
        row=test_deaths.ROWS["reader_killed_and_no_router_says_so"],
        worker="p0",
        taken=Fault.LEASES_OF_THE_LOST,
        fails_with="not let go",
    ),
    "no_expiry": Control(
        row=test_deaths.ROWS["reader_hangs"],
        worker="p0",
        taken=Fault.NO_EXPIRY,
        fails_with="not let go",
    ),
    "no_checksum": Control(
        row=replace(test_transport_errors.ROWS["byte_flipped"], shape=Shape(verify="off")),
        worker="d0",
        taken=Fault.BYTE_FLIPPED,
        fails_with="kv_mismatch",
    ),
    "a_leak": Control(
        row=Row(run=plain, wave=10),
        worker="d0",
        taken=Fault.LEAK,
        fails_with="grown",
        repeats=LEAKS_FROM,
    ),
}


@pytest.mark.parametrize("control", CONTROLS)
async def test_the_row_fails_without(zygote: Zygote, control: str) -> None:
    chosen = CONTROLS[control]
    with pytest.raises(AssertionError, match=chosen.fails_with):
        await soak(zygote, chosen.weakened(), chosen.repeats)


async def test_the_meter_is_steady_without_a_leak(zygote: Zygote) -> None:
    await soak(zygote, Row(run=plain, wave=10), LEAKS_FROM)
