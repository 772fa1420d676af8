"""Part `control`: from the owner's announcement to the first read of it.

Both processes read CLOCK_MONOTONIC, which Linux shares between processes. The owner notes it before
it calls announce(); the reader's transport is watched. A reader is bound before, as it is when a
prefill runs, and each hand-off announces one block.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.numbers import Samples
from benchmarks.processes import Side, idle_pair
from benchmarks.transfer.path import SHM, ucx_tls
from benchmarks.transfer.rig import LLAMA_8B, ArenaTask, Door, OwnerRig, owner_rig, reader_rig
from benchmarks.types import BenchFailed, Finding, Part, ResultTable, Run, Target
from core.ids import BlockId, LeaseId
from kv_transfer.leases import Lease

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTROL_TARGET_MS = 1.0

_ARENA_BLOCKS = 8
_BIND_TIMEOUT_S = 10.0
_SETTLE_S = 0.002
_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlTask:
    arena: ArenaTask
    handoffs: int
    warm_up: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlResult:
    """Seconds since the announcement: the read asked of the transport, begun by it, ended."""

    asked: Samples
    begun: Samples
    ended: Samples


@dataclass(frozen=True, slots=True)
class _Offer:
    """Owner to reader: a lease without blocks."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class _Announced:
    """Owner to reader: when, by CLOCK_MONOTONIC."""

    at_s: float


@dataclass(frozen=True, slots=True)
class _Finished:
    """Reader to owner: it has heard all that it waits for."""


# -- the two processes --------------------------------------------------------------------------


async def own(side: Side, task: ControlTask) -> None:
    """Offer, wait for the reader, announce one block, finish. Stay until the reader has heard all:
    the end of a stream may overtake what was sent on it last.
    """
    async with owner_rig(task.arena) as rig:
        side.send(rig.door)
        blocks = rig.pool.allocate(1) or []
        for number in range(task.warm_up + task.handoffs):
            lease = rig.open(number)
            side.send(_Offer(lease.lease_id))
            side.send(_Announced(await _announce(rig, lease, blocks)))
            await _until_closed(rig, lease)
        await side.receive(_Finished)


async def _announce(rig: OwnerRig, lease: Lease, blocks: list[BlockId]) -> float:
    async with asyncio.timeout(_BIND_TIMEOUT_S):
        while lease.reader is None:  # noqa: ASYNC110 - bounded, and nothing else to do
            await asyncio.sleep(_SETTLE_S)
    await asyncio.sleep(_SETTLE_S)
    at_s = time.monotonic()
    rig.owner.announce(lease, blocks)
    rig.finish(lease, ())
    return at_s


async def _until_closed(rig: OwnerRig, lease: Lease) -> None:
    async with asyncio.timeout(_BIND_TIMEOUT_S):
        while rig.owner.table.get(lease.lease_id) is not None:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(_SETTLE_S)


async def read(side: Side, task: ControlTask) -> ControlResult:
    """Bind each lease early, and note when its read was asked for, begun and ended."""
    asked: list[float] = []
    begun: list[float] = []
    ended: list[float] = []
    async with reader_rig(task.arena) as rig:
        door = await side.receive(Door)
        for number in range(task.warm_up + task.handoffs):
            offer = await side.receive(_Offer)
            rig.watched.reads.clear()
            pulled = await rig.pull(door, offer.lease_id, number, 1)
            rig.pool.release(pulled.blocks)
            announced = await side.receive(_Announced)
            if len(rig.watched.reads) != 1:
                raise BenchFailed(f"{len(rig.watched.reads)} reads for one block")
            read = rig.watched.reads[0]
            if number >= task.warm_up:
                asked.append(read.asked_at_s - announced.at_s)
                begun.append(read.begun_at_s - announced.at_s)
                ended.append(read.ended_at_s - announced.at_s)
            side.progress("announcements", number, task.warm_up + task.handoffs)
        side.send(_Finished())
    return ControlResult(
        asked=Samples(tuple(asked)), begun=Samples(tuple(begun)), ended=Samples(tuple(ended))
    )


# -- seen from the bench ------------------------------------------------------------------------


def run(run: Run) -> Finding:
    """Over shared memory; the way of the data does not matter to what is measured."""
    task = ControlTask(
        arena=ArenaTask(layout=LLAMA_8B, num_blocks=_ARENA_BLOCKS, device=run.device),
        handoffs=60 if run.quick else 500,
        warm_up=5,
    )
    pair = idle_pair(run, ucx_tls(SHM, run.device))
    result = pair.run(own, read, task, progress=run.progress, timeout_s=_TIMEOUT_S)
    p50_ms = result.begun.median_s * 1e3
    rows = (
        _cells("read asked of the transport", result.asked),
        _cells("read begun on the transfer thread", result.begun),
        _cells("read of one 2 MiB block ended", result.ended),
    )
    return Finding(
        tables=(
            ResultTable(
                title=f"from the owner's announcement, ms, {task.handoffs} hand-offs",
                columns=("until", "p50", "p90", "least..greatest"),
                texts=1,
                rows=rows,
            ),
        ),
        targets=(
            Target(
                promise=f"announcement to first read in less than {CONTROL_TARGET_MS:g} ms, median",
                measured=f"{p50_ms:.3f} ms",
                held=p50_ms < CONTROL_TARGET_MS,
            ),
        ),
        keys={
            "control_ms_p50": round(p50_ms, 4),
            "control_ms_p90": round(result.begun.p90_s * 1e3, 4),
        },
        draw=lambda axes: _draw(axes, result),
    )


def _cells(name: str, samples: Samples) -> tuple[str, ...]:
    p50, p90 = samples.median_s * 1e3, samples.p90_s * 1e3
    return (name, f"{p50:.3f}", f"{p90:.3f}", samples.spread())


def _draw(axes: Axes, result: ControlResult) -> None:
    """Share of hand-offs within a time."""
    for name, samples in (
        ("asked", result.asked),
        ("begun", result.begun),
        ("ended", result.ended),
    ):
        ordered = sorted(samples.seconds)
        shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
        axes.step([s * 1e3 for s in ordered], shares, where="post", label=f"read {name}")
    axes.axvline(CONTROL_TARGET_MS, color="grey", linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("ms since the announcement")
    axes.set_ylabel("share of hand-offs")
    axes.set_title("control cost of an announcement")
    axes.legend(fontsize=8)


PART = Part(
    name="control",
    what="from an announcement to the first read of what it announces",
    keys=("control_ms_p50", "control_ms_p90"),
    run=run,
)
