"""The rows of a CSV file, whose cells are asked for by kind: a bad one is named with its line."""

import csv
import gzip
import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from core.errors import plain
from simulator.profiles.types import BadProfile


@dataclass(frozen=True, slots=True)
class Row:
    """One line below the header. All that it is asked raises BadProfile, naming file and line."""

    file: Path
    line: int
    cells: Mapping[str, str | None]

    def text(self, name: str) -> str:
        """Of a column that must be there."""
        cell = self.cells.get(name)
        if cell is None:
            raise self.bad(f"there is no {name}")
        return cell

    def number(self, name: str) -> float:
        """Not negative, and finite."""
        text = self.text(name)
        try:
            value = float(text)
        except ValueError:
            raise self.bad(f"{name} is {text!r}, which is no number") from None
        if not isfinite(value) or value < 0:
            raise self.bad(f"{name} is {text}, but should be a number from 0 up")
        return value

    def whole(self, name: str, least: int = 0) -> int:
        """A count, `least` or more."""
        value = int(self.number(name))
        if value < least:
            raise self.bad(f"{name} is {value}, but should be {least} or more")
        return value

    def bad(self, why: str) -> BadProfile:
        """What to raise when this row cannot be used."""
        return BadProfile(f"{self.file}, line {self.line}: {why}")


def read_rows(file: Path) -> list[Row]:
    """Of a file with a header, gzipped or not. Raises BadProfile, also when there are none."""
    try:
        raw = file.read_bytes()
        text = gzip.decompress(raw) if file.suffix == ".gz" else raw
        reader = csv.DictReader(io.StringIO(text.decode()))
        rows = [Row(file, reader.line_num, cells) for cells in reader]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise BadProfile(f"cannot read {file}: {plain(error)}") from error
    if not rows:
        raise BadProfile(f"{file} holds no rows")
    return rows
