"""Part `layouts`: the same prompt read from a block-first and from a layer-first arena.

Once with equal tensor parallelism on both sides (TP 1), once from TP 2 to TP 4. Every rank of the
reader reads all it needs, one rank after the other, so that each case moves the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

import torch

from benchmarks.numbers import Samples
from benchmarks.processes import Side, idle_pair
from benchmarks.transfer.path import SHM, ucx_tls
from benchmarks.transfer.rig import LLAMA_8B, ArenaTask, make_arena, make_transport
from benchmarks.types import BenchFailed, Finding, Json, Part, ResultTable, Run
from core.ids import BlockId, ShardId, new_incarnation, shard_id
from core.kv import BLOCK_FIRST, LAYER_FIRST, Axis, KvLayout
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.plan import ArenaShape, ReadPlan, plan_read
from kv_transfer.transport import Transport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES: dict[tuple[Axis, ...], str] = {BLOCK_FIRST: "block-first", LAYER_FIRST: "layer-first"}
_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutTask:
    """One case. Layouts are those of the ranks, in order."""

    owners: tuple[KvLayout, ...]
    readers: tuple[KvLayout, ...]
    num_blocks: int
    device: str
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutResult:
    """Descriptors of all ranks together; `seconds` is from the plan to the end of the last read,
    `planning` the part of it that made plans.
    """

    nbytes: int
    descriptors: int
    seconds: Samples
    planning: Samples


@dataclass(frozen=True, slots=True)
class _Shards:
    """Owner to reader: the arenas of its ranks."""

    memories: tuple[Memory, ...]


@dataclass(frozen=True, slots=True)
class _Finished:
    """Reader to owner: the arenas may go."""


# -- the two processes --------------------------------------------------------------------------


async def own(side: Side, task: LayoutTask) -> None:
    """Serve one arena per rank; every 16 bytes are their own number, 0 in rank 0."""
    async with _ranks(task.owners, task) as ranks:
        for i, (arena, _) in enumerate(ranks):
            words = _words(arena)
            torch.arange(len(words), out=words)
            words += i << 40
        side.send(_Shards(tuple(transport.memory() for _, transport in ranks)))
        await side.receive(_Finished)


async def read(side: Side, task: LayoutTask) -> LayoutResult:
    """Read the whole prompt into every rank, `rounds` times."""
    remote, local = _scattered(task.num_blocks, 1), _scattered(task.num_blocks, 2)
    owners = [ArenaShape(layout, task.num_blocks) for layout in task.owners]
    shards = [shard_id(new_incarnation(), rank) for rank in range(len(owners))]
    seconds: list[float] = []
    planning: list[float] = []
    async with _ranks(task.readers, task) as ranks:
        memories = (await side.receive(_Shards)).memories
        for _, transport in ranks:
            for shard, memory in zip(shards, memories, strict=True):
                await transport.connect(shard, memory)
        for i in range(task.rounds + 1):
            started_s = time.perf_counter()
            planned_s, nbytes, descriptors = 0.0, 0, 0
            for arena, transport in ranks:
                before_s = time.perf_counter()
                shape = ArenaShape(arena.layout, task.num_blocks)
                plans = plan_read(owners, shape, remote, local)
                planned_s += time.perf_counter() - before_s
                nbytes += sum(plan.nbytes for plan in plans.values())
                descriptors += sum(plan.descriptors for plan in plans.values())
                await _read_rank(transport, shards, plans)
                if i == 0:
                    _check(arena, plans)
            if i:
                seconds.append(time.perf_counter() - started_s)
                planning.append(planned_s)
            side.progress(_name(task), i, task.rounds + 1)
    side.send(_Finished())
    return LayoutResult(
        nbytes=nbytes,
        descriptors=descriptors,
        seconds=Samples(tuple(seconds)),
        planning=Samples(tuple(planning)),
    )


async def _read_rank(
    transport: Transport, shards: list[ShardId], plans: dict[int, ReadPlan]
) -> None:
    for future in [transport.start_read(shards[i], plan) for i, plan in plans.items()]:
        await future


def _check(arena: Arena, plans: dict[int, ReadPlan]) -> None:
    """The first word of a few of the runs is that of the owner's arena at their offset."""
    words = _words(arena)
    for owner, plan in plans.items():
        for theirs, ours, _ in plan.rows[:: max(1, len(plan.rows) // 64)].tolist():
            if int(words[ours // 8]) != (owner << 40) + theirs // 8:
                raise BenchFailed(f"the bytes at {ours} are not the owner's at {theirs}")


@asynccontextmanager
async def _ranks(
    layouts: tuple[KvLayout, ...], task: LayoutTask
) -> AsyncIterator[list[tuple[Arena, Transport]]]:
    """An arena and a transport per rank; in a cluster each would be a process of its own."""
    incarnation = new_incarnation()
    ranks: list[tuple[Arena, Transport]] = []
    try:
        for layout in layouts:
            arena = make_arena(
                ArenaTask(layout=layout, num_blocks=task.num_blocks, device=task.device)
            )
            ranks.append((arena, make_transport("nixl", arena, incarnation)))
        yield ranks
    finally:
        for _, transport in ranks:
            await transport.close()


def _scattered(num_blocks: int, seed: int) -> list[BlockId]:
    blocks = [BlockId(i) for i in range(num_blocks)]
    Random(seed).shuffle(blocks)
    return blocks


def _words(arena: Arena) -> torch.Tensor:
    return arena.data.view(-1).view(torch.int64)


# -- seen from the bench ------------------------------------------------------------------------


def run(run: Run) -> Finding:
    """Both arenas, equal TP and TP 2 to 4."""
    blocks = 16 if run.quick else 64
    rounds = 5 if run.quick else 9
    results: list[tuple[LayoutTask, LayoutResult]] = []
    pair = idle_pair(run, ucx_tls(SHM, run.device))
    for axes in (BLOCK_FIRST, LAYER_FIRST):
        for owners, readers in ((1, 1), (2, 4)):
            task = LayoutTask(
                owners=sharded(LLAMA_8B, owners, axes),
                readers=sharded(LLAMA_8B, readers, axes),
                num_blocks=blocks,
                device=run.device,
                rounds=rounds,
            )
            result = pair.run(own, read, task, progress=run.progress, timeout_s=_TIMEOUT_S)
            results.append((task, result))
    return _finding(results)


def sharded(layout: KvLayout, tp_size: int, axes: tuple[Axis, ...]) -> tuple[KvLayout, ...]:
    """The layouts of all ranks that share the heads of `layout`."""
    return tuple(
        replace(
            layout,
            num_kv_heads=layout.num_kv_heads // tp_size,
            tp_size=tp_size,
            tp_rank=rank,
            total_kv_heads=layout.num_kv_heads,
            axes=axes,
        )
        for rank in range(tp_size)
    )


def _finding(results: list[tuple[LayoutTask, LayoutResult]]) -> Finding:
    equal = {
        _axes(task): result for task, result in results if len(task.owners) == len(task.readers)
    }
    tokens = results[0][0].num_blocks * LLAMA_8B.block_size
    return Finding(
        tables=(
            ResultTable(
                title=f"reading {tokens} tokens in scattered blocks, over shared memory",
                columns=("arena", "TP", "reads", "bytes each", "ms", "of it planning", "GB/s"),
                texts=2,
                rows=tuple(_cells(task, result) for task, result in results),
            ),
        ),
        keys={
            "descriptors_block_first": equal["block-first"].descriptors,
            "descriptors_layer_first": equal["layer-first"].descriptors,
            "layouts": [_row(task, result) for task, result in results],
        },
        draw=lambda axes: _draw(axes, results),
    )


def _axes(task: LayoutTask) -> str:
    return _NAMES[task.owners[0].axes]


def _name(task: LayoutTask) -> str:
    return f"{_axes(task)}, TP {len(task.owners)} to {len(task.readers)}"


def _cells(task: LayoutTask, result: LayoutResult) -> tuple[str, ...]:
    return (
        _axes(task),
        f"{len(task.owners)} to {len(task.readers)}",
        f"{result.descriptors:,}",
        f"{result.nbytes // result.descriptors:,}",
        f"{result.seconds.median_s * 1e3:.2f}",
        f"{result.planning.median_s * 1e3:.2f}",
        f"{result.seconds.gb_per_s(result.nbytes):.2f}",
    )


def _row(task: LayoutTask, result: LayoutResult) -> Json:
    return {
        "arena": _axes(task),
        "owner_tp": len(task.owners),
        "reader_tp": len(task.readers),
        "mib": result.nbytes >> 20,
        "descriptors": result.descriptors,
        "median_ms": round(result.seconds.median_s * 1e3, 3),
        "planning_ms": round(result.planning.median_s * 1e3, 3),
    }


def _draw(axes: Axes, results: list[tuple[LayoutTask, LayoutResult]]) -> None:
    """Time of each case, its descriptors written above."""
    names = [f"{_axes(task)}\nTP {len(task.owners)} to {len(task.readers)}" for task, _ in results]
    heights = [result.seconds.median_s * 1e3 for _, result in results]
    bars = axes.bar(names, heights)
    axes.bar_label(bars, [f"{result.descriptors:,} reads" for _, result in results], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylabel="ms", title="block-first against layer-first arena")


PART = Part(
    name="layouts",
    what="descriptors and time from a block-first and a layer-first arena",
    keys=("descriptors_block_first", "descriptors_layer_first", "layouts"),
    run=run,
)
