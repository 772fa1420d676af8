"""Why a process ended, as far as its log tells."""

import re
from pathlib import Path

_READ_BYTES = 64 * 1024
_FATAL = re.compile(r"^Fatal Python error: (?P<what>.+)$", re.MULTILINE)
_SIGNAL = re.compile(r"^\*\*\* (?P<what>SIG[A-Z]+) received", re.MULTILINE)
_TAIL_LINES = 15


def last_words(log: Path, life: str = "", next_life: str = "") -> str:
    """One line on the end of a process that left no exit status to read.

    Only the part of the log from `life` up to `next_life` counts: the process that takes over
    may already write to the same file.
    """
    text = _of_life(log, life, next_life)
    if match := _FATAL.search(text) or _SIGNAL.search(text):
        return f"it crashed: {match['what']}"
    return "it ended without a word: killed from outside, perhaps for want of memory"


def tail(log: Path, life: str = "", next_life: str = "") -> str:
    """The last lines of that part, indented."""
    lines = _of_life(log, life, next_life).splitlines()[-_TAIL_LINES:]
    return "\n".join(f"    {line}" for line in lines) or "    (nothing)"


def _of_life(log: Path, life: str, next_life: str) -> str:
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _READ_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    start = text.find(life) + len(life) if life in text else 0
    end = text.find(next_life, start) if next_life else -1
    return text[start:end] if end >= 0 else text[start:]
