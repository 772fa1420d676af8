"""What a worker process is told, and how it is told to stop. Light to import."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cluster.config import ClusterConfig
from core.ids import Role, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """One worker of a cluster. `host` is the address its door listens on."""

    worker_id: WorkerId
    role: Role
    config: ClusterConfig
    registry_address: str
    run_dir: Path
    log: Path
    host: str = "127.0.0.1"


class StopSignal:
    """Set once, from any thread; wakes whoever is inside `wakes`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requested = False
        self._callbacks: list[Callable[[], None]] = []

    @property
    def requested(self) -> bool:
        return self._requested

    def request(self) -> None:
        """Ask for a stop. Repeating it does nothing."""
        with self._lock:
            callbacks = [] if self._requested else list(self._callbacks)
            self._requested = True
            # Under the lock, so that no callback runs after its `wakes` block.
            for callback in callbacks:
                callback()

    @contextmanager
    def wakes(self, callback: Callable[[], None]) -> Iterator[None]:
        """Inside the block a stop calls `callback`, from another thread, or at once if it came."""
        with self._lock:
            self._callbacks.append(callback)
            if self._requested:
                callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.remove(callback)


RunSoon = Callable[[Callable[[], None]], object]
"""Runs a function on a host's event loop, soon and from any thread; returns at once."""


class Pulse:
    """Whether a host's event loop turns. Asked from any thread, and never waits for the loop."""

    def __init__(self) -> None:
        self._run_soon: RunSoon | None = None
        self._beats = 0

    def of(self, run_soon: RunSoon) -> None:
        """From here on the host serves."""
        self._run_soon = run_soon

    def ask(self) -> int:
        """How many earlier questions the loop has answered; this one is its next."""
        if self._run_soon is not None:
            self._run_soon(self._beat)
        return self._beats

    def _beat(self) -> None:
        self._beats += 1


class WorkerHost(Protocol):
    """Runs one worker on the calling thread.

    Calls `ready` once the worker serves. Returns after `stop` was requested; raises what ended the
    worker otherwise, a BatonError when it is the user's to mend.
    """

    def __call__(
        self, spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]
    ) -> None: ...
