"""What the controller tells whoever watches it: the terminal, a script, the demo, a test."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.ids import Role, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Starting:
    """A step of the start has begun."""

    step: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSwept:
    """What a dead run had left behind is gone."""

    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReady:
    """A worker serves. `startup_s` counts from the start of its process."""

    worker_id: WorkerId
    role: Role
    pid: int
    startup_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDied:
    """A worker that had served is gone; another process takes its place in `restart_in_s`."""

    worker_id: WorkerId
    pid: int
    reason: str
    log: Path
    restart_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterDied:
    """The router is gone; another process takes its place in `restart_in_s`."""

    pid: int
    reason: str
    log: Path
    restart_in_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterReady:
    """Requests are served at `url`."""

    run_id: str
    url: str
    model: str
    startup_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """The cluster goes down; requests in flight have `drain_s` left."""

    reason: str
    drain_s: float


Event = Starting | RunSwept | WorkerReady | WorkerDied | RouterDied | ClusterReady | Stopping
Report = Callable[[Event], None]
