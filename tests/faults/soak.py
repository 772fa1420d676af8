"""Repeat a fault row, and see that its survivors hold no more at the end than early on."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.rig import FOUR, Rig, Shape, running_rig
from tests.faults.zygote import Zygote

LEAKS_FROM = 100
"""Fewer repeats are too few to tell a leak from what is set up once."""
RSS_GROWTH = 1.05
SETTLE_S = 5.0
_SHM_NAMES = ("ucx_", "nixl", "psm_", "torch_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One fault. `run` injects it as often as it is told, at most `wave` times, and checks that
    every request ended as it must; it returns when the survivors are free again.
    """

    run: Callable[[Rig, int], Awaitable[None]]
    wave: int = 1
    shape: Shape = FOUR


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What one process holds of the machine."""

    rss_kib: int
    files: int
    threads: int
    shm: int

    def fits(self, early: "Footprint") -> bool:
        return (
            self.rss_kib <= early.rss_kib * RSS_GROWTH
            and self.files <= early.files
            and self.threads <= early.threads
            and self.shm <= early.shm
        )


def footprint(pid: int) -> Footprint:
    """As the kernel sees it now."""
    proc = Path("/proc") / str(pid)
    status = dict(
        line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line
    )
    maps = (proc / "maps").read_text().splitlines()
    owned = [
        line
        for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        if int(line.split()[4]) == pid
    ]
    return Footprint(
        rss_kib=int(status["VmRSS"].split()[0]),
        files=sum(1 for _ in (proc / "fd").iterdir()),
        threads=sum(_is_ours(task) for task in (proc / "task").iterdir()),
        shm=sum("/dev/shm/" in line or "/SYSV" in line for line in maps) + len(owned),
    )


def _is_ours(task: Path) -> bool:
    """gRPC starts and ends threads of its own pool by its load, within its bounds."""
    try:
        return (task / "comm").read_text().strip() != "event_engine"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def soak(zygote: Zygote, row: Row, repeats: int) -> None:
    """Run the row `repeats` times; from LEAKS_FROM on, compare the footprints."""
    left_before = _left_in_shm()
    async with running_rig(zygote, row.shape) as rig:
        done, early = 0, None
        while done < repeats:
            count = min(row.wave, repeats - done)
            await row.run(rig, count)
            done += count
            if early is None and done >= repeats // 4 and repeats >= LEAKS_FROM:
                await rig.set_up_all()
                early = await _steady(rig)
        if early is not None:
            await _assert_fits(rig, early)
    await _assert_none_left(left_before)


async def _steady(rig: Rig) -> dict[int, Footprint]:
    """Footprints by pid, once two looks in a row agree on files and threads."""
    before: dict[int, Footprint] = {}
    give_up_s = time.monotonic() + SETTLE_S
    while True:
        await _collect(rig)
        now = {handle.pid: footprint(handle.pid) for handle in rig.workers.values()}
        same = all(
            pid in before and (before[pid].files, before[pid].threads) == (f.files, f.threads)
            for pid, f in now.items()
        )
        if same or time.monotonic() > give_up_s:
            return now
        before = now
        await asyncio.sleep(0.3)


async def _assert_fits(rig: Rig, early: dict[int, Footprint]) -> None:
    """Closed descriptors take a moment to go: looks until SETTLE_S have passed."""
    give_up_s = time.monotonic() + SETTLE_S
    while True:
        await _collect(rig)
        grown = {
            handle.name: (early[handle.pid], late)
            for handle in rig.workers.values()
            if handle.pid in early and not (late := footprint(handle.pid)).fits(early[handle.pid])
        }
        if not grown:
            return
        assert time.monotonic() < give_up_s, f"grown: {grown}"
        await asyncio.sleep(0.1)


async def _collect(rig: Rig) -> None:
    for handle in rig.workers.values():
        await handle.collect()


def _left_in_shm() -> set[str]:
    """UCX unlinks its segments as soon as it has them: none should be seen."""
    directory = Path("/dev/shm")
    if not directory.is_dir():
        return set()
    return {entry.name for entry in directory.iterdir() if entry.name.startswith(_SHM_NAMES)}


async def _assert_none_left(before: set[str]) -> None:
    give_up_s = time.monotonic() + SETTLE_S
    while left := _left_in_shm() - before:
        assert time.monotonic() < give_up_s, f"left in /dev/shm: {left}"
        await asyncio.sleep(0.1)
