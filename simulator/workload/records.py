"""A trace as it was recorded, and the lines of the file that holds it."""

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core.errors import InvalidRequest, plain

MOST_REQUESTS = 2_000_000


class BadTrace(InvalidRequest):
    """A file is no trace, or a line of it is broken; the message names the line."""


@dataclass(frozen=True, slots=True)
class Record:
    """A request as recorded. Of a session, `at_s` counts from the session's start.

    Equal `ids` mean equal blocks of `block_size` tokens, if all before them are equal too.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    ids: tuple[int, ...] = ()
    session: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A whole trace, in the order of the file. `timed` is false where a file has no arrivals."""

    kind: str
    records: tuple[Record, ...]
    block_size: int
    skipped: Counter[str]
    timed: bool = True


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file, with its number for the one who must mend it; or an item of an array."""

    file: Path
    number: int
    text: str
    kind: str = "line"

    def bad(self, why: str) -> BadTrace:
        """What to raise when this line cannot be read."""
        return BadTrace(f"{self.file}, {self.kind} {self.number}: {why}")


def check_count(name: str, count: int) -> None:
    """Raises BadTrace where so many requests would not fit into memory."""
    if count > MOST_REQUESTS:
        raise BadTrace(
            f"{count} requests of {name} are too many; {MOST_REQUESTS} are the most: ask for fewer"
            " with --requests"
        )


def read_lines(file: Path) -> Iterator[Line]:
    """Of a text file, gzipped or not. Raises BadTrace when it cannot be read."""
    try:
        with (
            gzip.open(file, "rt", encoding="utf-8-sig")
            if file.suffix == ".gz"
            else file.open(encoding="utf-8-sig")
        ) as stream:
            for number, text in enumerate(stream, start=1):
                yield Line(file, number, text.rstrip("\r\n"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadTrace(f"cannot read {file}: {plain(error)}") from error


def trace_name(file: Path) -> str:
    """The name of a trace: its file's, without endings."""
    return file.name.split(".")[0]
