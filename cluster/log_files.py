"""Keeps the logs of a run small: one that has grown too large becomes NAME.log.1, and begins anew.

Its process appends to it and knows nothing of this, so the file stays: its text is copied, and then
it is cut to nothing, as logrotate's copytruncate does. What is written in between is lost.
"""

import asyncio
import logging
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0


async def keep_small(folder: Path, most_bytes: int) -> None:
    """All `*.log` in it, for ever."""
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        await asyncio.to_thread(_rotate_all, folder, most_bytes)


def _rotate_all(folder: Path, most_bytes: int) -> None:
    try:
        files = list(folder.glob("*.log"))
    except OSError as error:  # no file can be opened, perhaps
        log.warning("logs_not_looked_at folder=%s reason=%s", folder, error)
        return
    for file in files:
        rotate(file, most_bytes)


def rotate(file: Path, most_bytes: int) -> None:
    """If it is larger than that. On a full disk it is cut without a copy: room is needed most."""
    try:
        if file.stat().st_size <= most_bytes:
            return
        old = file.with_name(f"{file.name}.1")
        try:
            shutil.copyfile(file, old)
        except OSError as error:
            old.unlink(missing_ok=True)
            log.warning("log_not_copied file=%s reason=%s", file, error)
        with file.open("r+b") as grown:
            grown.truncate()
    except OSError as error:
        log.warning("log_not_rotated file=%s reason=%s", file, error)
