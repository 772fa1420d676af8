"""A workload from a file of any known format, told by its content, or from a generator's name."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from simulator.workload.build import Shaping, build_workload
from simulator.workload.csv_traces import is_csv_trace, read_csv_trace
from simulator.workload.generated import generate, generators, is_generated
from simulator.workload.json_traces import read_json_trace
from simulator.workload.records import (
    BadTrace,
    Line,
    Record,
    Recorded,
    check_count,
    read_lines,
    trace_name,
)
from simulator.workload.servegen import compose, is_servegen
from simulator.workload.types import Workload

_UNTIMED_GAP_S = 1.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A workload, and what a user must know of how it was made: what was skipped, or assumed."""

    workload: Workload
    notes: tuple[str, ...]


def load_workload(source: str | Path, shaping: Shaping | None = None) -> Loaded:
    """From a trace file (Mooncake, agent sessions, Qwen-Bailian, ShareGPT, a vLLM bench, Azure,
    BurstGPT, Splitwise, Vidur, ServeGen windows; gzipped or not), or from a line such as
    `poisson:rate=4`. Raises BadTrace, a sentence that names the line.
    """
    shaping = shaping or Shaping()
    check_count(str(source), shaping.requests or 0)
    if isinstance(source, str) and is_generated(source):
        recorded = generate(source, seed=shaping.seed, requests=shaping.requests)
        name = source.partition(":")[0]
    else:
        file = Path(source)
        with suppress(OSError):  # what else is amiss reading it says
            if not file.exists():
                known = generators()
                raise BadTrace(f"there is no trace file {file}, and no such generator: {known}")
        recorded, name = read_trace(file, shaping), trace_name(file)
    workload = build_workload(name, recorded, shaping)
    return Loaded(workload, tuple(_notes(recorded)))


def read_trace(file: Path, shaping: Shaping) -> Recorded:
    """What a file holds, as recorded. Raises BadTrace."""
    lines = read_lines(file)
    blank = list[Line]()
    for first in lines:
        if first.text.strip():
            break
        blank.append(first)
    else:
        raise BadTrace(f"{file} is empty")
    whole: Iterator[Line] = chain([first], lines)
    if is_servegen(first.text):
        return compose(
            whole,
            file,
            seed=shaping.seed,
            requests=shaping.requests,
            start_s=shaping.start_s,
            rate_rps=shaping.rate_rps,
        )
    if is_csv_trace(first.text):
        return read_csv_trace(whole)
    if first.text.lstrip().startswith(("{", "[")):
        return _with_times(read_json_trace(chain(blank, whole)))
    raise first.bad(
        "neither a JSON object nor the header of a known trace"
        " (Azure, BurstGPT, Splitwise, Vidur, ServeGen)"
    )


def _with_times(recorded: Recorded) -> Recorded:
    """Text without times: an answer a second after the one before it, within its session."""
    if recorded.timed:
        return recorded
    records, turn, session = list[Record](), 0, ""
    for record in recorded.records:
        turn = turn + 1 if record.session == session else 0
        session = record.session
        records.append(
            Record(
                at_s=turn * _UNTIMED_GAP_S,
                prompt_tokens=record.prompt_tokens,
                output_tokens=record.output_tokens,
                ids=record.ids,
                session=session,
            )
        )
    return Recorded(
        kind=recorded.kind,
        records=tuple(records),
        block_size=recorded.block_size,
        skipped=recorded.skipped,
        timed=False,
    )


def _notes(recorded: Recorded) -> Iterator[str]:
    for reason, count in sorted(recorded.skipped.items()):
        yield f"{count} x {reason}"
    if not recorded.timed:
        yield "the trace has no arrival times: sessions begin at random, one per second"
        yield "tokens are counted as four characters each"
    elif recorded.records and recorded.records[0].session:
        yield "sessions begin at random, one per second, divided by the rate scale"
