"""Two processes to measure between: `owner` has the blocks, `reader` wants them.

The bench gives both the same task and waits for the reader's answer. They speak to the bench and to
each other by pickled values over socket pairs; a side whose other end is gone ends.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from textwrap import indent
from types import TracebackType
from typing import Protocol, TypeVar, cast

from benchmarks.types import BenchFailed, Progress, Run
from benchmarks.zygote import Zygote

T = TypeVar("T")
R = TypeVar("R")

_STOP_TIMEOUT_S = 5.0
_OTHER_TIMEOUT_S = 120.0
_LOG_TAIL = 3000


class Side(Protocol):
    """What a work function sees of the bench and of the other process."""

    def progress(self, text: str, done: int, total: int) -> None: ...

    def send(self, value: object) -> None:
        """To the other process."""
        ...

    async def receive(self, kind: type[T]) -> T:
        """The next value of the other process. Raises BenchFailed if there is none in time."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """Bench to child: await `work(side, task)`."""

    work: Callable[..., Coroutine[None, None, object]]
    task: object


@dataclass(frozen=True, slots=True)
class Step:
    """Child to bench: how far it is."""

    text: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Done:
    """Child to bench: what the work gave back."""

    value: object


@dataclass(frozen=True, slots=True)
class Failed:
    """Child to bench: its traceback, and its last line for people."""

    reason: str
    trace: str


class ChildSide:
    """Implements Side, in the child."""

    def __init__(self, bench: Connection, other: Connection) -> None:
        self._bench = bench
        self._other = other

    def progress(self, text: str, done: int, total: int) -> None:
        self._bench.send(Step(text, done, total))

    def send(self, value: object) -> None:
        self._other.send(value)

    async def receive(self, kind: type[T]) -> T:
        await self._heard()
        value = self._other.recv()
        if not isinstance(value, kind):
            raise BenchFailed(f"the other process sent {value!r}, not a {kind.__name__}")
        return value

    async def _heard(self) -> None:
        """On the event loop, not in a thread that waits: starting one would take the interpreter
        from what is measured, which begins as soon as the other process has been told.
        """
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()
        loop.add_reader(self._other.fileno(), heard.set)
        try:
            async with asyncio.timeout(_OTHER_TIMEOUT_S):
                await heard.wait()
        except TimeoutError:
            raise BenchFailed(
                f"the other process said nothing for {_OTHER_TIMEOUT_S:g} s"
            ) from None
        finally:
            loop.remove_reader(self._other.fileno())


class Pair:
    """Two children of the bench, started by `with`; each runs one work function at a time."""

    def __init__(self, zygote: Zygote, environment: Mapping[str, str] | None = None) -> None:
        self._zygote = zygote
        self._environment = environment or {}
        self._children: list[_Child] = []

    def __enter__(self) -> Pair:
        ends = Pipe()
        try:
            for name, end in zip(("owner", "reader"), ends, strict=True):
                self._children.append(_Child(self._zygote, name, end, self._environment))
        except BaseException:
            self._end(orderly=False)
            raise
        finally:
            for end in ends:
                end.close()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(orderly=error is None)

    def run(
        self,
        owner: Callable[[Side, T], Coroutine[None, None, None]],
        reader: Callable[[Side, T], Coroutine[None, None, R]],
        task: T,
        *,
        progress: Progress,
        timeout_s: float,
    ) -> R:
        """Both work on `task` at once; answers the reader's result. Raises BenchFailed."""
        works: tuple[Callable[..., Coroutine[None, None, object]], ...] = (owner, reader)
        for child, work in zip(self._children, works, strict=True):
            child.connection.send(Job(work, task))
        give_up_at_s = time.monotonic() + timeout_s
        busy = list(self._children)
        values: dict[str, object] = {}
        while busy:
            left_s = max(0.0, give_up_at_s - time.monotonic())
            ready = wait([child.connection for child in busy], left_s)
            if not ready:
                raise BenchFailed(f"{reader.__module__} did not end within {timeout_s:g} s")
            for child in [child for child in busy if child.connection in ready]:
                match child.receive():
                    case Step(text, done, total):
                        progress(text, done, total)
                    case Done(value):
                        busy.remove(child)
                        values[child.name] = value
        return cast(R, values["reader"])

    def _end(self, *, orderly: bool) -> None:
        for child in self._children:
            child.stop(orderly=orderly)
        for child in self._children:
            child.join()
        self._children.clear()


def idle_pair(run: Run, environment: Mapping[str, str]) -> Pair:
    """The run's pair with these variables set, started when it is first asked for."""
    key = ("pair", *sorted(environment.items()))
    return run.kept.of(key, lambda: Pair(run.zygote, environment))


class _Child:
    """One process of `benchmarks.child`. Its output goes to a file, shown only if it fails."""

    def __init__(
        self, zygote: Zygote, name: str, link: Connection, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.connection, mine = Pipe()
        with mine:
            self._process = zygote.fork(
                "benchmarks.child",
                (),
                environment=environment,
                output=self._log.fileno(),
                errors=self._log.fileno(),
                descriptors=(mine.fileno(), link.fileno()),
            )

    def receive(self) -> Step | Done:
        """What it says next. Raises BenchFailed with its reason, or the end of its log."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            raise BenchFailed(f"the {self.name} process died\n{self._tail()}") from None
        if isinstance(message, Failed):
            raise BenchFailed(f"the {self.name} process failed: {message.reason}\n{message.trace}")
        if not isinstance(message, Step | Done):
            raise BenchFailed(f"the {self.name} process said {message!r}")
        return message

    def stop(self, *, orderly: bool) -> None:
        """An idle child ends by itself when the bench closes its end; a busy one is told."""
        self.connection.close()
        if not orderly:
            self._process.terminate()

    def join(self) -> None:
        self._process.join(_STOP_TIMEOUT_S)
        self._log.close()

    def _tail(self) -> str:
        written = os.fstat(self._log.fileno()).st_size
        start = max(0, written - _LOG_TAIL)
        text = os.pread(self._log.fileno(), _LOG_TAIL, start).decode(errors="replace")
        return indent(text.rstrip(), "  ")
