"""Ends what a run left behind: its processes, known by BATON_RUN_DIR, and its folders.

A controller that was killed outright could not clean up; the next start does it here. The same
function ends a living run's own stragglers after an orderly stop.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.run_dir import RUN_DIR_VARIABLE, RunDir, all_runs, orphaned_memory

log = logging.getLogger(__name__)

_TERM_S = 3.0
_KILL_S = 3.0
_POLL_S = 0.05
_UNFINISHED_S = 3600.0


def sweep_dead_runs(root: Path) -> list[str]:
    """End the processes and remove the folders of all dead runs; gives their ids."""
    swept: list[str] = []
    for run in all_runs(root):
        if run.is_alive():
            continue
        ended = end_processes(run)
        run.remove()
        log.info("dead_run_swept run_id=%s processes=%d", run.run_id, ended)
        swept.append(run.run_id)
    for memory in orphaned_memory(root):
        shutil.rmtree(memory, ignore_errors=True)
    _remove_unfinished(root)
    return swept


def end_processes(run: RunDir, term_s: float = _TERM_S) -> int:
    """SIGTERM, then SIGKILL after `term_s`, to every process of the run but this one.

    Takes at most `term_s` plus 3 s. Gives how many there were.
    """
    processes = run_processes(run)
    for process in processes:
        _signal(process, psutil.Process.terminate)
    for process in _left_after(run, term_s):
        _signal(process, psutil.Process.kill)
    for process in _left_after(run, _KILL_S):
        log.warning("process_outlived_its_run pid=%d run_id=%s", process.pid, run.run_id)
    return len(processes)


def _left_after(run: RunDir, timeout_s: float) -> list[psutil.Process]:
    give_up_at_s = time.monotonic() + timeout_s
    while left := run_processes(run):
        if time.monotonic() >= give_up_at_s:
            break
        time.sleep(_POLL_S)
    return left


def run_processes(run: RunDir) -> list[psutil.Process]:
    """Living processes of this user that carry the run's folder in their environment."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(RUN_DIR_VARIABLE) == str(run.path):
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone, a zombie, or another user's
    return found


def _signal(process: psutil.Process, send: Callable[[psutil.Process], None]) -> None:
    try:
        send(process)
    except psutil.Error:
        return


def _remove_unfinished(root: Path) -> None:
    """Folders of runs that died between their first and their last line of `RunDir.create`."""
    for path in root.glob(".*"):
        try:
            old = time.time() - path.lstat().st_mtime > _UNFINISHED_S
        except OSError:
            continue
        if old:
            shutil.rmtree(path, ignore_errors=True)
