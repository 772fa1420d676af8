"""Traces with a header and a request per line: Azure, BurstGPT, Splitwise, Vidur."""

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from simulator.workload.records import Line, Record, Recorded


def _date_s(text: str) -> float:
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Columns:
    kind: str
    at: str
    prompt: str
    output: str
    seconds: Callable[[str], float] = float


_KINDS = (
    _Columns(
        kind="azure",
        at="TIMESTAMP",
        prompt="ContextTokens",
        output="GeneratedTokens",
        seconds=_date_s,
    ),
    _Columns(kind="burstgpt", at="Timestamp", prompt="Request tokens", output="Response tokens"),
    _Columns(
        kind="vidur", at="arrived_at", prompt="num_prefill_tokens", output="num_decode_tokens"
    ),
    _Columns(kind="splitwise", at="arrival_timestamp", prompt="prompt_size", output="token_size"),
)


def is_csv_trace(header: str) -> bool:
    """Whether a first line is the header of a trace that is known here."""
    return _find(header) is not None


def read_csv_trace(lines: Iterator[Line]) -> Recorded:
    """All requests of a file. Those without a prompt or an answer, which failed, are skipped."""
    first = next(lines)
    columns = _find(first.text)
    if columns is None:
        raise first.bad(f"not the header of a known trace: {first.text[:80]!r}")
    names = _cells(first)
    places = [names.index(name) for name in (columns.at, columns.prompt, columns.output)]
    records, skipped = list[Record](), Counter[str]()
    for line in lines:
        if not line.text.strip():
            skipped["empty line"] += 1
            continue
        record = _record(line, _cells(line), places, columns.seconds)
        if record.prompt_tokens < 1 or record.output_tokens < 1:
            skipped["no prompt or no answer"] += 1
        else:
            records.append(record)
    return Recorded(kind=columns.kind, records=tuple(records), block_size=512, skipped=skipped)


def _find(header: str) -> _Columns | None:
    names = {name.strip() for name in header.split(",")}
    for columns in _KINDS:
        if {columns.at, columns.prompt, columns.output} <= names:
            return columns
    return None


def _cells(line: Line) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line.text], strict=True))]
    except csv.Error as error:
        raise line.bad(str(error)) from error


def _record(
    line: Line, cells: Sequence[str], places: Sequence[int], seconds: Callable[[str], float]
) -> Record:
    try:
        at, prompt, output = (cells[place] for place in places)
        at_s = seconds(at)
        if not math.isfinite(at_s):
            raise ValueError(f"its time is {at}")
        return Record(at_s, _count(prompt), _count(output))
    except IndexError:
        raise line.bad(f"only {len(cells)} columns: {line.text[:80]!r}") from None
    except (ValueError, OverflowError) as error:
        raise line.bad(str(error)) from error


def _count(text: str) -> int:
    number = float(text)
    if number < 0 or number != int(number):
        raise ValueError(f"{text} is not a count")
    return int(number)
