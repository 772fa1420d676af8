"""Which running cluster a command means, and how to end one."""

import contextlib
import os
import signal
import time

from cluster.run_dir import RunDir, RunInfo, live_runs, runs_root
from cluster.sweep import end_processes
from core.errors import UserError

_FORCE_S = 10.0
_POLL_S = 0.1

NO_CLUSTER = "no cluster is running; start one with `baton up`"


class NoSuchRun(UserError):
    """No cluster is running, or not the one named, or several and none is named."""


def choose_run(run_id: str | None) -> RunDir:
    """The run named, or the only one. Raises NoSuchRun."""
    runs = live_runs(runs_root())
    if not runs:
        raise NoSuchRun(NO_CLUSTER)
    if run_id is not None:
        for run in runs:
            if run.run_id == run_id:
                return run
        raise NoSuchRun(f"no cluster {run_id} is running; running: {_listed(runs)}")
    if len(runs) > 1:
        raise NoSuchRun(f"{len(runs)} clusters are running, choose one with --run: {_listed(runs)}")
    return runs[0]


def stop_run(run: RunDir, timeout_s: float) -> bool:
    """Stop a cluster and wait until nothing of it is left; False when it had to be killed.

    It is asked once, asked again after `timeout_s`, and killed 10 s later.
    """
    info = _info(run)
    for wait_s in (timeout_s, _FORCE_S):
        if info is not None and info.controller_lives():
            _send(info, signal.SIGTERM)
            _wait_for_end(info, wait_s)
    if not run.path.exists():
        return True
    if info is not None and info.controller_lives():
        _send(info, signal.SIGKILL)
    end_processes(run)
    run.remove()
    return False


def _wait_for_end(info: RunInfo, timeout_s: float) -> None:
    give_up_at_s = time.monotonic() + timeout_s
    while info.controller_lives() and time.monotonic() < give_up_at_s:
        time.sleep(_POLL_S)


def _send(info: RunInfo, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(info.pid, number)


def _info(run: RunDir) -> RunInfo | None:
    try:
        return run.info()
    except (OSError, ValueError):
        return None


def _listed(runs: list[RunDir]) -> str:
    infos = [_info(run) for run in runs]
    return ", ".join(f"{info.run_id} ({info.model}, {info.router_url})" for info in infos if info)
