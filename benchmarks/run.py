"""`baton bench NAME`: run a bench, show its tables, draw its plot, end with one JSON object."""

import json
import logging
import os
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.kept import Kept
from benchmarks.machine import Machine, arena_device, describe_machine
from benchmarks.types import PEERS, Bench, Finding, Json, Part, ResultTable, Run, Target
from benchmarks.types import Progress as Report
from benchmarks.zygote import Zygote
from cluster.long_work import can_be_file, write_result
from cluster.plot import draw_plot
from cluster.tables import new_table, print_table
from core.errors import InvalidRequest

BENCHES = {
    "router": "the front door: CPU per token and request, latency added, idle streams",
    "routing": "placement decisions: replayed traces under every policy, and what one costs",
    "reproduce": "what papers published, simulated: placement, P/D ratios, mixes of lengths",
    "simulator": "requests simulated per second of one core, and the memory they take",
    "transfer": "the KV hand-off between two processes: what it costs, what it hides",
    "validate": "the simulator against formulas, published results and a real run",
}
"""What each bench measures. Its `BENCH` is in benchmarks/NAME/bench.py, imported when it runs."""

_LINE_EVERY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for. No `parts` means all of them, those that measure other
    systems only with `peers`.

    The plot goes to `plot`, else into `out`, else into the current folder; with `out` the JSON
    object is written beside it.
    """

    quick: bool = False
    parts: tuple[str, ...] = ()
    peers: bool = False
    traces: tuple[Path, ...] = ()
    profiles: Path | None = None
    only_json: bool = False
    out: Path | None = None
    plot: Path | None = None


def describe_benches() -> str:
    """One line per bench."""
    return "\n".join(f"{name}  {what}" for name, what in sorted(BENCHES.items()))


def find_bench(name: str) -> Bench:
    """Raises InvalidRequest naming the benches there are."""
    if name not in BENCHES:
        raise InvalidRequest(f"there is no bench {name!r}; there is: {', '.join(sorted(BENCHES))}")
    bench: Bench = import_module(f"benchmarks.{name}.bench").BENCH
    return bench


def run_bench(name: str, options: Options) -> None:
    """Measure and print. The last line of standard output is the JSON object."""
    logging.getLogger().addHandler(logging.NullHandler())  # what fails is raised
    bench = find_bench(name)
    parts = choose_parts(bench, options.parts, {PEERS} if options.peers else ())
    _check_files(bench, parts, options)
    machine = describe_machine()
    device = arena_device(machine)
    started_s = time.monotonic()
    findings = dict(_measure(parts, device, options))
    result = _result(bench, findings, machine, device, quick=options.quick)
    result["seconds"] = round(time.monotonic() - started_s, 1)
    if not options.only_json:
        _show(Console(), bench, findings, machine)
    try:
        _write(bench, findings, result, options)
    finally:
        print(json.dumps(result), flush=True)


def choose_parts(bench: Bench, names: Sequence[str], options: Container[str] = ()) -> list[Part]:
    """The parts named, in the bench's order; without names, all that need none but these options.

    Raises InvalidRequest for a part or an option the bench does not have.
    """
    if options and not any(part.option in options for part in bench.parts):
        raise InvalidRequest(f"bench {bench.name} knows no peers")
    known = [part.name for part in bench.parts]
    for name in names:
        if name not in known:
            raise InvalidRequest(
                f"bench {bench.name} has no part {name!r}; it has: {', '.join(known)}"
            )
    if names:
        return [part for part in bench.parts if part.name in names]
    return [part for part in bench.parts if part.option is None or part.option in options]


def _check_files(bench: Bench, parts: Sequence[Part], options: Options) -> None:
    """Raises InvalidRequest for what would fail, or not be looked at, after minutes of work."""
    if options.traces and not bench.takes_traces:
        raise InvalidRequest(f"bench {bench.name} replays no --trace")
    if options.profiles is not None and not bench.takes_profiles:
        raise InvalidRequest(f"bench {bench.name} reads no --profiles")
    for part in parts:
        if part.needs_trace and not options.traces:
            raise InvalidRequest(
                f"bench {bench.name}, part {part.name} replays traces: give one with --trace FILE"
            )
    for trace in options.traces:
        if not os.access(trace, os.R_OK):
            raise InvalidRequest(f"--trace: there is no file {trace} that can be read")
    if options.profiles is not None and not options.profiles.is_dir():
        raise InvalidRequest(f"--profiles: there is no folder {options.profiles}")
    if options.plot is not None and not can_be_file(options.plot):
        raise InvalidRequest(f"--plot: {options.plot} cannot be written")
    if options.out is not None and not can_be_file(options.out / f"{bench.name}.json"):
        raise InvalidRequest(f"--out: nothing can be written in {options.out}")


# -- measuring ----------------------------------------------------------------------------------


def _measure(parts: Sequence[Part], device: str, options: Options) -> Iterator[tuple[str, Finding]]:
    with Zygote() as zygote, Kept() as kept:
        for i, part in enumerate(parts):
            title = f"{i + 1}/{len(parts)} {part.name}"
            with _progress(title, part.what) as report:
                run = Run(
                    quick=options.quick,
                    device=device,
                    progress=report,
                    zygote=zygote,
                    kept=kept,
                    traces=options.traces,
                    profiles=options.profiles,
                )
                yield part.name, part.run(run)


@contextmanager
def _progress(title: str, what: str) -> Iterator[Report]:
    """A bar on standard error; where that is no terminal, a line now and one a minute."""
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"{title}: {what}", file=sys.stderr, flush=True)
        yield _lines(title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(escape(f"{title}: {what}"), total=None)

        def report(text: str, done: int, total: int) -> None:
            bar.update(task, description=escape(f"{title}: {text}"), completed=done, total=total)

        yield report


def _lines(title: str) -> Report:
    said_s = time.monotonic()

    def report(text: str, done: int, total: int) -> None:
        nonlocal said_s
        if time.monotonic() - said_s >= _LINE_EVERY_S:
            said_s = time.monotonic()
            print(f"{title}: {text}, {done} of {total}", file=sys.stderr, flush=True)

    return report


# -- what is left -------------------------------------------------------------------------------


def _result(
    bench: Bench, findings: Mapping[str, Finding], machine: Machine, device: str, *, quick: bool
) -> dict[str, Json]:
    """The JSON object: all keys of the bench, those of parts that were not run too."""
    result: dict[str, Json] = {
        key: part.otherwise.get(key) for part in bench.parts for key in part.keys
    }
    for finding in findings.values():
        result.update(finding.keys)
    result["bench"] = bench.name
    result["quick"] = quick
    result["device"] = device
    result["at"] = datetime.now(UTC).isoformat(timespec="seconds")
    result["targets_missed"] = [target.promise for target in _targets(findings) if not target.held]
    result["machine"] = json.loads(json.dumps(asdict(machine)))
    return result


def _targets(findings: Mapping[str, Finding]) -> list[Target]:
    return [target for finding in findings.values() for target in finding.targets]


def _show(
    console: Console, bench: Bench, findings: Mapping[str, Finding], machine: Machine
) -> None:
    gpus = f", {', '.join(machine.gpus)}" if machine.gpus else ""
    console.print(
        f"\n[bold]baton bench {bench.name}[/] on {escape(machine.cpu)}, {machine.cores} cores,"
        f" {machine.memory_gib:g} GiB{escape(gpus)}",
        highlight=False,
        soft_wrap=True,
    )
    for finding in findings.values():
        for table in finding.tables:
            console.print()
            _show_table(console, table)
        for note in finding.notes:
            console.print(f"[dim]{escape(note)}[/]", highlight=False, soft_wrap=True)
    console.print()
    for target in _targets(findings):
        mark = "[green]yes[/]" if target.held else "[red]NO [/]"
        text = f"{mark}  {escape(target.promise)}  [dim]{escape(target.measured)}[/]"
        console.print(text, highlight=False, soft_wrap=True)
    console.print()


def _show_table(console: Console, table: ResultTable) -> None:
    shown = new_table(
        table.columns[: table.texts], table.columns[table.texts :], title=escape(table.title)
    )
    for row in table.rows:
        shown.add_row(*map(escape, row))
    print_table(console, shown)


def _write(
    bench: Bench, findings: Mapping[str, Finding], result: dict[str, Json], options: Options
) -> None:
    if options.out is not None:
        file = options.out / f"{bench.name}.json"
        write_result(file, json.dumps(result, indent=1) + "\n", "--out", makes_folder=True)
        print(f"wrote {file}", file=sys.stderr)
    if options.plot is not None:
        plot = options.plot
    elif options.out is not None:
        plot = options.out / f"{bench.name}.png"
    elif options.only_json:
        return
    else:
        plot = Path(f"baton-bench-{bench.name}.png")
    draws = {name: finding.draw for name, finding in findings.items() if finding.draw is not None}
    print(draw_plot(plot, f"baton bench {bench.name}", draws), file=sys.stderr)
