"""Part `path`: a whole hand-off against the bare copy of the same fragments.

Owner and reader are two processes. Per round and in turn: the hand-off from its handle to usable
blocks; the same with the owner's answer in place of its seal; raw NIXL reads of exactly the
fragments that this hand-off posted, prepared and unprepared; and memcpy of them within the reader,
the limit of any way. Each begins after a word with the owner: a hand-off needs one for its handle,
and what ran without a pause after another copy of the same bytes would find caches that a hand-off
does not.
"""

import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.numbers import Samples, interleave
from benchmarks.processes import Side
from benchmarks.transfer.rig import (
    ArenaTask,
    Door,
    ReaderRig,
    block_bytes,
    first_wrong,
    make_arena,
    owner_rig,
    reader_rig,
)
from benchmarks.types import BenchFailed
from core.ids import BlockId, LeaseId
from kv_transfer.plan import ReadPlan

if TYPE_CHECKING:
    from benchmarks.transfer.raw import RawAgent

PATH, ANSWERED, PREPARED, UNPREPARED, MEMCPY = (
    "path",
    "answered",
    "raw prepared",
    "raw unprepared",
    "memcpy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputTask:
    """Move a whole arena at a time, so that every way reads and writes the same memory. `raw`:
    measure NIXL alone as well, which makes sense only beside the nixl backend, as does `answered`,
    hand-offs that wait for the owner. `busy`: a thread of the owner's runs Python without a pause,
    as an engine's may.
    """

    arena: ArenaTask
    rounds: int
    raw: bool
    answered: bool
    busy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeResult:
    """One size: samples by way, and the descriptors of one hand-off."""

    nbytes: int
    descriptors: int
    ways: dict[str, Samples]

    @property
    def raw_s(self) -> float:
        """The better raw median."""
        return min(self.ways[PREPARED].median_s, self.ways[UNPREPARED].median_s)

    @property
    def ratio_to_raw(self) -> float:
        return self.raw_s / self.ways[PATH].median_s

    @property
    def added_us(self) -> float:
        """What the path takes over the better raw read."""
        return (self.ways[PATH].median_s - self.raw_s) * 1e6


# -- owner --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Want:
    """Reader to owner: a finished lease on all blocks for hand-off `number`, or only a word; 0 ends
    the work.
    """

    number: int
    lease: bool = True


@dataclass(frozen=True, slots=True)
class _Word:
    """Owner to reader, where no lease was wanted."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """Owner to reader: its handle, and which blocks are behind it."""

    lease_id: LeaseId
    block_ids: tuple[BlockId, ...]


async def own(side: Side, task: ThroughputTask) -> None:
    """Offer leases on request."""
    async with owner_rig(task.arena) as rig, _beside(busy=task.busy):
        blocks = rig.pool.allocate(task.arena.num_blocks) or []
        side.send(rig.door)
        if task.raw:
            from benchmarks.transfer.raw import RawAgent  # noqa: PLC0415 - loads UCX

            raw = RawAgent(rig.arena, "raw-owner")
            side.send(raw.memory)
        while (want := await side.receive(_Want)).number:
            if not want.lease:
                side.send(_Word())
                continue
            lease = rig.open(want.number)
            rig.finish(lease, blocks)
            side.send(_Ready(lease.lease_id, tuple(lease.blocks)))
        if task.raw:
            raw.close()


@asynccontextmanager
async def _beside(*, busy: bool) -> AsyncIterator[None]:
    """Inside, whoever is busy is."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            sum(range(2000))

    worker = threading.Thread(target=work, daemon=True)
    if busy:
        worker.start()
    try:
        yield
    finally:
        over.set()


# -- reader -------------------------------------------------------------------------------------


async def read(side: Side, task: ThroughputTask) -> SizeResult:
    """Measure every way, in turn."""
    title = (
        f"{task.arena.backend} {task.arena.num_blocks * task.arena.layout.block_bytes >> 20} MiB"
    )

    def on_round(i: int) -> None:
        side.progress(title, i, task.rounds + 1)

    async with reader_rig(task.arena) as rig:
        handoff = _Handoff(side, rig, await side.receive(Door))
        raw = await _connect_raw(side, rig) if task.raw else None
        samples = await interleave(task.rounds, _ways(handoff, raw, task), on_round=on_round)
        side.send(_Want(0))
        if raw is not None:
            raw.close()
        return SizeResult(
            nbytes=rig.arena.nbytes, descriptors=handoff.plan.descriptors, ways=samples
        )


def _ways(
    handoff: "_Handoff", raw: "RawAgent | None", task: ThroughputTask
) -> dict[str, Callable[[], Awaitable[float]]]:
    target = block_bytes(handoff.rig.arena).view(-1)
    spare = block_bytes(make_arena(task.arena)).view(-1)

    async def memcpy_s() -> float:
        await handoff.word()
        return copy_rows_s(target, spare, handoff.plan)

    ways: dict[str, Callable[[], Awaitable[float]]] = {PATH: handoff.measure_s}
    if raw is not None:

        async def prepared_s() -> float:
            await handoff.word()
            return raw.prepared_s(handoff.plan)

        async def unprepared_s() -> float:
            await handoff.word()
            return raw.unprepared_s(handoff.plan)

        ways |= {PREPARED: prepared_s, UNPREPARED: unprepared_s}
        if task.answered:
            ways[ANSWERED] = handoff.answered_s
    ways[MEMCPY] = memcpy_s
    return ways


async def _connect_raw(side: Side, rig: ReaderRig) -> "RawAgent":
    from benchmarks.transfer.raw import RawAgent, RawMemory  # noqa: PLC0415 - loads UCX

    raw = RawAgent(rig.arena, "raw-reader")
    raw.connect(await side.receive(RawMemory))
    return raw


class _Handoff:
    """The whole path, again and again. `plan` is what it posted last."""

    plan: ReadPlan

    def __init__(self, side: Side, rig: ReaderRig, door: Door) -> None:
        self._side = side
        self.rig = rig
        self._door = door
        self._number = 0

    async def word(self) -> None:
        """What comes before a hand-off, without a lease."""
        self._side.send(_Want(-1, lease=False))
        await self._side.receive(_Word)

    async def answered_s(self) -> float:
        """As `measure_s`, waiting for the owner."""
        reader, config = self.rig.reader, self.rig.reader.config
        reader.config = config.model_copy(update={"seals": False})
        try:
            return await self.measure_s()
        finally:
            reader.config = config

    async def measure_s(self) -> float:
        self._number += 1
        self._side.send(_Want(self._number))
        ready = await self._side.receive(_Ready)
        self.rig.watched.reads.clear()
        blocks = self.rig.arena.num_blocks
        started_s = time.perf_counter()
        pulled = await self.rig.pull(self._door, ready.lease_id, self._number, blocks)
        taken_s = time.perf_counter() - started_s
        if self._number == 1:
            wrong = first_wrong(self.rig.arena, ready.block_ids, pulled.blocks)
            if wrong is not None:
                raise BenchFailed(f"block {wrong} of the hand-off is not what the owner has")
        (read,) = self.rig.watched.reads
        self.plan = read.plan
        self.rig.pool.release(pulled.blocks)
        return taken_s


def copy_rows_s(target: torch.Tensor, source: torch.Tensor, plan: ReadPlan) -> float:
    """Copy the plan's fragments within this process; both `[nbytes]` uint8. Answers seconds."""
    rows = plan.rows.tolist()
    started_s = time.perf_counter()
    for theirs, ours, nbytes in rows:
        target[ours : ours + nbytes].copy_(source[theirs : theirs + nbytes])
    if target.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
