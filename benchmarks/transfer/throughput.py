"""Part `path`: a whole hand-off against the bare copy of the same fragments.

Owner and reader are two processes. Per round and in turn: the hand-off from its handle to usable
blocks; raw NIXL reads of exactly the fragments that this hand-off posted, prepared and unprepared;
and memcpy of them within the reader, the limit of any way.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
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
    owner_rig,
    reader_rig,
)
from benchmarks.types import BenchFailed
from core.ids import BlockId, LeaseId
from kv_transfer.plan import ReadPlan

if TYPE_CHECKING:
    from benchmarks.transfer.raw import RawAgent

PATH, PREPARED, UNPREPARED, MEMCPY = "path", "raw prepared", "raw unprepared", "memcpy"


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeTask:
    """How often to move how much."""

    num_blocks: int
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputTask:
    """`raw`: also measure NIXL alone, which makes sense only beside the nixl backend."""

    arena: ArenaTask
    sizes: tuple[SizeTask, ...]
    raw: bool


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
    """Reader to owner: a finished lease on so many blocks; 0 ends the work."""

    number: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class _Ready:
    """Owner to reader: its handle, and which blocks are behind it."""

    lease_id: LeaseId
    block_ids: tuple[BlockId, ...]


async def own(side: Side, task: ThroughputTask) -> None:
    """Offer leases on request."""
    async with owner_rig(task.arena) as rig:
        blocks = rig.pool.allocate(task.arena.num_blocks) or []
        side.send(rig.door)
        if task.raw:
            from benchmarks.transfer.raw import RawAgent  # noqa: PLC0415 - loads UCX

            raw = RawAgent(rig.arena, "raw-owner")
            side.send(raw.memory)
        while (want := await side.receive(_Want)).num_blocks:
            lease = rig.open(want.number)
            rig.finish(lease, blocks[: want.num_blocks])
            side.send(_Ready(lease.lease_id, tuple(lease.blocks)))
        if task.raw:
            raw.close()


# -- reader -------------------------------------------------------------------------------------


async def read(side: Side, task: ThroughputTask) -> tuple[SizeResult, ...]:
    """Measure every size."""
    async with reader_rig(task.arena) as rig:
        door = await side.receive(Door)
        raw = await _connect_raw(side, rig) if task.raw else None
        spare = torch.ones_like(block_bytes(rig.arena)).view(-1)
        total = sum(size.rounds + 1 for size in task.sizes)
        done = 0
        results: list[SizeResult] = []
        numbers = count(1)
        for size in task.sizes:

            def on_round(i: int, size: SizeTask = size, before: int = done) -> None:
                mib = size.num_blocks * rig.arena.layout.block_bytes >> 20
                side.progress(f"{task.arena.backend} {mib} MiB", before + i, total)

            handoff = _Handoff(side, rig, door, size.num_blocks, numbers)
            results.append(await _measure(handoff, raw, spare, size, on_round))
            done += size.rounds + 1
        side.send(_Want(0, 0))
        if raw is not None:
            raw.close()
        return tuple(results)


async def _connect_raw(side: Side, rig: ReaderRig) -> "RawAgent":
    from benchmarks.transfer.raw import RawAgent, RawMemory  # noqa: PLC0415 - loads UCX

    raw = RawAgent(rig.arena, "raw-reader")
    raw.connect(await side.receive(RawMemory))
    return raw


class _Handoff:
    """The whole path, again and again. `plan` is what it posted last."""

    def __init__(
        self, side: Side, rig: ReaderRig, door: Door, num_blocks: int, numbers: "count[int]"
    ) -> None:
        self._side = side
        self.rig = rig
        self._door = door
        self._num_blocks = num_blocks
        self._numbers = numbers
        self._checked = False

    async def measure_s(self) -> float:
        number = next(self._numbers)
        self._side.send(_Want(number, self._num_blocks))
        ready = await self._side.receive(_Ready)
        self.rig.watched.reads.clear()
        started_s = time.perf_counter()
        pulled = await self.rig.pull(self._door, ready.lease_id, number, self._num_blocks)
        taken_s = time.perf_counter() - started_s
        if not self._checked:
            wrong = first_wrong(self.rig.arena, ready.block_ids, pulled.blocks)
            if wrong is not None:
                raise BenchFailed(f"block {wrong} of hand-off {number} is not what the owner has")
            self._checked = True
        self.rig.pool.release(pulled.blocks)
        return taken_s

    def plan(self) -> ReadPlan:
        (read,) = self.rig.watched.reads
        return read.plan


async def _measure(
    handoff: _Handoff,
    raw: "RawAgent | None",
    spare: torch.Tensor,
    size: SizeTask,
    on_round: Callable[[int], None],
) -> SizeResult:
    nbytes = size.num_blocks * handoff.rig.arena.layout.block_bytes

    async def memcpy_s() -> float:
        return copy_rows_s(block_bytes(handoff.rig.arena).view(-1), spare, handoff.plan())

    ways: dict[str, Callable[[], Awaitable[float]]] = {PATH: handoff.measure_s}
    if raw is not None:

        async def prepared_s() -> float:
            return raw.prepared_s(handoff.plan())

        async def unprepared_s() -> float:
            return raw.unprepared_s(handoff.plan())

        ways[PREPARED], ways[UNPREPARED] = prepared_s, unprepared_s
    ways[MEMCPY] = memcpy_s
    samples = await interleave(size.rounds, ways, on_round=on_round)
    return SizeResult(nbytes=nbytes, descriptors=handoff.plan().descriptors, ways=samples)


def copy_rows_s(target: torch.Tensor, source: torch.Tensor, plan: ReadPlan) -> float:
    """Copy the plan's fragments within this process; both `[nbytes]` uint8. Answers seconds."""
    rows = plan.rows.tolist()
    started_s = time.perf_counter()
    for theirs, ours, nbytes in rows:
        target[ours : ours + nbytes].copy_(source[theirs : theirs + nbytes])
    if target.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started_s
