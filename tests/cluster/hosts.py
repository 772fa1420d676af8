"""Worker hosts without an engine, for tests of what surrounds one; named by path there."""

import os
import threading
from collections.abc import Callable

from cluster.worker_spec import StopSignal, WorkerSpec
from core.errors import ConfigError


def idle(spec: WorkerSpec, stop: StopSignal, ready: Callable[[], None]) -> None:
    """Ready at once, serves nothing."""
    print(f"idle host of {spec.worker_id} in {os.getpid()}")
    stopped = threading.Event()
    with stop.wakes(stopped.set):
        ready()
        stopped.wait()


def fails_after_ready(spec: WorkerSpec, stop: StopSignal, ready: Callable[[], None]) -> None:
    """The first life of decode-0 ends in an error once it has served; all else is idle."""
    mark = spec.run_dir / "failed_once"
    if spec.worker_id == "decode-0" and not mark.exists():
        mark.touch()
        ready()
        raise ValueError("the engine is condemned")
    idle(spec, stop, ready)


def misconfigured(spec: WorkerSpec, stop: StopSignal, ready: Callable[[], None]) -> None:
    """A set-up the user must mend."""
    raise ConfigError(f"{spec.worker_id} finds no weights in DIR")
