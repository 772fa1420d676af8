"""Server processes of a bench: started, heard when they are ready, and ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import indent

import psutil

from benchmarks.types import BenchFailed
from core.ids import Role
from core.registry import WorkerRecord

_STOP_TIMEOUT_S = 10.0
_LOG_TAIL = 3000


class Server:
    """One running process. It reads its orders, a line each, from standard input."""

    def __init__(self, name: str, process: subprocess.Popen[str], log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log

    def first_line(self) -> str:
        """What it prints once it serves. Raises BenchFailed with its log when it ends instead."""
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise BenchFailed(f"{self.name} did not start\n{self.last_words()}")
        return line

    def tell(self, line: str) -> None:
        """Raises BenchFailed when it has gone."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()
        except OSError:
            raise BenchFailed(f"{self.name} has ended\n{self.last_words()}") from None

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def last_words(self) -> str:
        """The end of its log, indented."""
        return last_words(self._log)

    def cpu_s(self) -> float:
        """CPU time so far of the process and its living children, all threads, from the OS."""
        return sum(_cpu_s(process) for process in _family(self.pid))


def last_words(log: Path) -> str:
    """The end of a log, indented."""
    text = log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
    return indent(text.rstrip(), "  ")


def read_record(line: str) -> WorkerRecord:
    """Of the line that a worker prints once it serves."""
    fields = json.loads(line)
    return WorkerRecord(**fields | {"role": Role(fields["role"])})


@contextmanager
def server(
    name: str,
    command: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    logs_stdout: bool = False,
) -> Iterator[Server]:
    """Run `command` inside the block; it ends with it, as with this process, however that comes.

    Its log is in `folder`. With `logs_stdout` what it prints goes there too, and `first_line` has
    nothing to read.
    """
    log = folder / f"{name}.log"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.leash", str(os.getpid()), *command],
            stdin=subprocess.PIPE,
            stdout=errors if logs_stdout else subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **(environment or {})},
            start_new_session=True,  # Ctrl-C is the bench's to handle
        )
    try:
        yield Server(name, process, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    family = _family(process.pid)
    process.terminate()
    try:
        process.communicate(timeout=_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    _, left = psutil.wait_procs(family[1:], timeout=1.0)
    for child in left:
        child.kill()


def _family(pid: int) -> list[psutil.Process]:
    """A process and what it started; nothing when it has gone."""
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return used.user + used.system
