"""What commands that take long have in common: a bar, an end by Ctrl-C, and files that are looked
at before the work, so that none of it is lost.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from core.errors import InvalidRequest, plain

_INTERRUPTED = 130


@contextmanager
def given_up(said: str) -> Iterator[None]:
    """An interrupt in the block prints `said` and ends the process with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted: {said}", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def check_writable(path: Path, option: str) -> None:
    """Raises InvalidRequest, a sentence that names `option`, where writing would fail. Touches
    nothing.
    """
    if not path.parent.is_dir():
        raise InvalidRequest(f"{option}: there is no folder {path.parent}")
    if not can_be_file(path):
        raise InvalidRequest(f"{option}: {path} cannot be written: a folder, or permission denied")


def can_be_file(path: Path) -> bool:
    """As far as can be told without touching anything, where missing folders will be made."""
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        return (nearest != path) == nearest.is_dir() and os.access(nearest, os.W_OK)
    except OSError:  # a name too long, or a folder that may not be looked into
        return False


def write_result(path: Path, text: str, option: str, *, makes_folder: bool = False) -> None:
    """Replaces the file. Raises InvalidRequest where the system refuses."""
    try:
        if makes_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{option}: {path} cannot be written: {plain(error)}") from error
