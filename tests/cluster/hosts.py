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


def fails_once(spec: WorkerSpec, stop: StopSignal, ready: Callable[[], None]) -> None:
    """Idle, but the first decode-0 fails when the test puts the file `fail` in the run's folder."""
    fail, failed = spec.run_dir / "fail", spec.run_dir / "failed"
    if spec.worker_id == "decode-0" and not failed.exists():
        ready()
        while not fail.exists():
            threading.Event().wait(0.05)
        failed.touch()
        raise ValueError("the engine is condemned")
    idle(spec, stop, ready)


def slow_to_stop(spec: WorkerSpec, stop: StopSignal, ready: Callable[[], None]) -> None:
    """Idle, and takes its time to end."""
    idle(spec, stop, ready)
    threading.Event().wait(3.5)


def misconfigured(spec: WorkerSpec, stop: StopSignal, ready: Callable[[], None]) -> None:
    """A set-up the user must mend."""
    # As a worker's parts raise it: from within their task groups.
    raise ExceptionGroup("x", [ConfigError(f"{spec.worker_id} finds no weights in DIR")])
