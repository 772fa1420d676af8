"""Files that a command writes after long work: looked at before it, so that none of it is lost."""

import os
from pathlib import Path

from core.errors import InvalidRequest


def check_writable(path: Path, option: str) -> None:
    """Raises InvalidRequest, a sentence that names `option`, where writing would fail. Touches
    nothing.
    """
    if not path.parent.is_dir():
        raise InvalidRequest(f"{option}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InvalidRequest(f"{option}: {path} cannot be written: permission denied")


def write_result(path: Path, text: str, option: str) -> None:
    """Replaces the file. Raises InvalidRequest where the system refuses."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{option}: {path} cannot be written: {error}") from error
