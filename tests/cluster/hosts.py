"""Worker hosts without an engine, for tests of what surrounds one; named by path there."""

import asyncio
import os
import threading
from collections.abc import Callable

from cluster.worker_spec import RunSoon, StopSignal, WorkerSpec
from core.errors import ConfigError


def idle(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """Ready at once, serves nothing."""
    print(f"idle host of {spec.worker_id} in {os.getpid()}")
    stopped = threading.Event()
    with stop.wakes(stopped.set):
        ready(_at_once)
        stopped.wait()


def fails_once(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """Idle, but the first decode-0 fails when the test puts the file `fail` in the run's folder."""
    fail, failed = spec.run_dir / "fail", spec.run_dir / "failed"
    if spec.worker_id == "decode-0" and not failed.exists():
        ready(_at_once)
        while not fail.exists():
            threading.Event().wait(0.05)
        failed.touch()
        raise ValueError("the engine is condemned")
    idle(spec, stop, ready)


def loads_for_ever(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """A decode-0 that is never ready."""
    idle(spec, stop, (lambda _: print("loading")) if spec.worker_id == "decode-0" else ready)


def slow_to_stop(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """Idle, and takes its time to end."""
    idle(spec, stop, ready)
    threading.Event().wait(3.5)


def drains(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """Idle; told to stop, it ends what another router sent it, and then makes the file that
    `model.path` names.
    """
    idle(spec, stop, ready)
    threading.Event().wait(7.0)
    spec.config.model.path.touch()


def misconfigured(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """A set-up the user must mend."""
    # As a worker's parts raise it: from within their task groups.
    raise ExceptionGroup("x", [ConfigError(f"{spec.worker_id} finds no weights in DIR")])


def stuck(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """Idle, but the loop of the first decode-0 stops when the test puts the file `stick` in the
    run's folder; its process answers on.
    """
    stick, lock = spec.run_dir / "stick", threading.Lock()
    if spec.worker_id != "decode-0" or (spec.run_dir / "stuck").exists():
        idle(spec, stop, ready)
        return

    async def serve() -> None:
        ready(asyncio.get_running_loop().call_soon_threadsafe)
        while not stick.exists():
            await asyncio.sleep(0.05)
        (spec.run_dir / "stuck").touch()
        lock.acquire()
        lock.acquire()

    asyncio.run(serve())


def _at_once(function: Callable[[], None]) -> None:
    """A RunSoon of a host without a loop."""
    function()
