"""Part `path`, seen from the bench: over shared memory, over TCP, and by the collective backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.processes import Pair, idle_pair
from benchmarks.transfer.rig import LLAMA_8B, ArenaTask
from benchmarks.transfer.throughput import (
    ANSWERED,
    MEMCPY,
    PATH,
    PREPARED,
    UNPREPARED,
    SizeResult,
    ThroughputTask,
    own,
    read,
)
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATIO_TARGET = 0.90
ADDED_TARGET_US = 500.0
SHM, BUSY, TCP, COLLECTIVE = "shm", "shm, busy owner", "tcp", "collective"

_BLOCKS_4MB, _BLOCKS_64MB, _BLOCKS_512MB = 2, 32, 256
_TIMEOUT_S = 240.0


def ucx_tls(way: str, device: str) -> dict[str, str]:
    """The environment that leaves UCX only this way between two processes of one machine.

    NIXL's agent needs tcp for its own messages even where the data go another way.
    """
    ways = {SHM: "tcp,sm,self", TCP: "tcp,self"}[way]
    if device != "cpu":
        ways += ",cuda_copy,cuda_ipc" if way == SHM else ",cuda_copy"
    return {"UCX_TLS": ways}


def run(run: Run) -> Finding:
    """Shared memory and TCP by nixl with raw reads beside it, then the collective backend."""
    results: dict[str, list[SizeResult]] = {}
    for way in (SHM, TCP):
        pair = idle_pair(run, ucx_tls(way, run.device))
        results[way] = [
            _measure(pair, run, "nixl", run.device, size) for size in _sizes(quick=run.quick)
        ]
        if way == SHM:
            few = _Size(_BLOCKS_4MB, 21)
            results[BUSY] = [_measure(pair, run, "nixl", run.device, few, busy=True)]
        if way == TCP:
            results[COLLECTIVE] = [
                _measure(pair, run, "collective", "cpu", size)
                for size in _collective_sizes(quick=run.quick)
            ]
    return _finding(results)


@dataclass(frozen=True, slots=True)
class _Size:
    """How much to move how often. `answered`: with the owner's answer too, in place of its seal;
    what that costs is the same for any size.
    """

    num_blocks: int
    rounds: int
    answered: bool = True


def _sizes(*, quick: bool) -> tuple[_Size, ...]:
    return (
        _Size(_BLOCKS_4MB, 21 if quick else 101),
        _Size(_BLOCKS_64MB, 7 if quick else 31, answered=not quick),
        _Size(_BLOCKS_512MB, 5 if quick else 11, answered=not quick),
    )


def _collective_sizes(*, quick: bool) -> tuple[_Size, ...]:
    return (
        _Size(_BLOCKS_4MB, 5 if quick else 31),
        _Size(_BLOCKS_64MB, 5 if quick else 11),
        *(() if quick else (_Size(_BLOCKS_512MB, 5),)),
    )


def _measure(
    pair: Pair, run: Run, backend: str, device: str, size: _Size, *, busy: bool = False
) -> SizeResult:
    task = ThroughputTask(
        arena=ArenaTask(
            layout=LLAMA_8B, num_blocks=size.num_blocks, device=device, backend=backend
        ),
        rounds=size.rounds,
        raw=backend == "nixl",
        answered=size.answered,
        busy=busy,
    )
    return pair.run(own, read, task, progress=run.progress, timeout_s=_TIMEOUT_S)


# -- what it means ------------------------------------------------------------------------------


def _finding(results: Mapping[str, Sequence[SizeResult]]) -> Finding:
    small = {way: results[way][0] for way in (SHM, TCP)}
    large = {way: results[way][1:] for way in (SHM, TCP)}
    ratios = {way: min(size.ratio_to_raw for size in large[way]) for way in (SHM, TCP)}
    targets = [
        Target(
            promise=f"a hand-off over {way} at {RATIO_TARGET:.2f} of raw NIXL or better",
            measured=f"{ratios[way]:.3f}, the least of 64 and 512 MiB",
            held=ratios[way] >= RATIO_TARGET,
        )
        for way in (SHM, TCP)
    ]
    targets += [
        Target(
            promise=f"at 4 MiB it adds less than {ADDED_TARGET_US:.0f} us over {way}",
            measured=f"{small[way].added_us:.0f} us",
            held=small[way].added_us < ADDED_TARGET_US,
        )
        for way in (SHM, TCP)
    ]
    return Finding(
        tables=(_table(results),),
        targets=tuple(targets),
        notes=(
            "raw: the same fragments by a bare NIXL agent; ratio: to the better of the two."
            " memcpy: one thread, within the reader. collective: Gloo, in host memory.",
            "ms answered: with the owner's answer in place of its seal. busy owner: a thread of its"
            " process runs Python without a pause, as an engine's may.",
        ),
        keys={
            "ratio_to_raw_shm": round(ratios[SHM], 4),
            "ratio_to_raw_tcp": round(ratios[TCP], 4),
            "added_us_4mib": {way: round(small[way].added_us, 1) for way in (SHM, TCP)},
            "throughput": [_row(way, size) for way, sizes in results.items() for size in sizes],
        },
        draw=lambda axes: _draw(axes, results),
    )


def _table(results: Mapping[str, Sequence[SizeResult]]) -> ResultTable:
    rows = [_cells(way, size) for way, sizes in results.items() for size in sizes]
    return ResultTable(
        title="hand-off, from handle to usable blocks: medians, GB/s = 10^9 bytes per second",
        columns=(
            "over",
            "MiB",
            "reads",
            "ms",
            "ms answered",
            "least..greatest",
            "GB/s",
            "raw prepared",
            "raw unprepared",
            "memcpy",
            "of raw",
            "added us",
        ),
        texts=1,
        rows=tuple(rows),
    )


def _cells(way: str, size: SizeResult) -> tuple[str, ...]:
    path = size.ways[PATH]

    def rate(name: str) -> str:
        return f"{size.ways[name].gb_per_s(size.nbytes):.2f}" if name in size.ways else "-"

    raw = PREPARED in size.ways
    return (
        way,
        f"{size.nbytes >> 20}",
        f"{size.descriptors}",
        f"{path.median_s * 1e3:.2f}",
        f"{size.ways[ANSWERED].median_s * 1e3:.2f}" if ANSWERED in size.ways else "-",
        path.spread(),
        rate(PATH),
        rate(PREPARED),
        rate(UNPREPARED),
        rate(MEMCPY),
        f"{size.ratio_to_raw:.3f}" if raw else "-",
        f"{size.added_us:.0f}" if raw else "-",
    )


def _row(way: str, size: SizeResult) -> Json:
    return {
        "over": way,
        "mib": size.nbytes >> 20,
        "descriptors": size.descriptors,
        "ratio_to_raw": round(size.ratio_to_raw, 4) if PREPARED in size.ways else None,
        "median_ms": {name: round(s.median_s * 1e3, 4) for name, s in size.ways.items()},
        "gb_per_s": {name: round(s.gb_per_s(size.nbytes), 3) for name, s in size.ways.items()},
        "rounds": len(size.ways[PATH].seconds),
    }


def _draw(axes: Axes, results: Mapping[str, Sequence[SizeResult]]) -> None:
    """Bars of GB/s, grouped by way and size."""
    names = (PATH, PREPARED, UNPREPARED, MEMCPY)
    groups = [(way, size) for way, sizes in results.items() for size in sizes]
    for i, name in enumerate(names):
        axes.bar(
            [group + (i - 1.5) * 0.2 for group in range(len(groups))],
            [s.ways[name].gb_per_s(s.nbytes) if name in s.ways else 0.0 for _, s in groups],
            width=0.2,
            label=name,
        )
    axes.set_xticks(range(len(groups)), [f"{way}\n{s.nbytes >> 20} MiB" for way, s in groups])
    axes.tick_params(axis="x", labelsize=7)
    axes.set(ylabel="GB/s", title="hand-off against the bare copy")
    axes.legend(fontsize=8)


PART = Part(
    name="path",
    what="throughput of a whole hand-off against raw NIXL reads of the same fragments",
    keys=("ratio_to_raw_shm", "ratio_to_raw_tcp", "added_us_4mib", "throughput"),
    run=run,
)
