"""Router and worker processes in a tenth of a second: forked from one that has imported everything.

The fork server (multiprocessing's) runs no thread, no event loop, no gRPC and no NIXL agent, so a
fork of it is as good as a fresh process that has done its imports. What it forked ends with it, and
it ends with the test's process.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_END_S = 10.0
_ENVIRON = {
    "GRPC_ENABLE_FORK_SUPPORT": "0",
    # Threads of a library would not survive a fork.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_PRELOADED = ["pytest", "cluster.router_main", "cluster.worker.__main__", "kv_transfer.nixl"]

Main = Callable[[list[str]], int]
"""The body of a process, importable by name: takes its arguments, gives its exit status."""


class Forked:
    """One process; `log` is what it writes to standard output and standard error."""

    def __init__(self, process: BaseProcess, log: Path) -> None:
        self._process = process
        self.log = log

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def ended(self) -> bool:
        return not self._process.is_alive()

    def kill(self) -> None:
        """SIGKILL, and wait for its end. Repeating it does nothing."""
        self._process.kill()
        self._process.join(_END_S)

    def stop(self) -> None:
        """SIGSTOP: it hangs; its sockets and memory stay."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def tail(self) -> str:
        """The last of its log."""
        return self.log.read_text()[-3000:] if self.log.exists() else ""


def fork(main: Main, arguments: list[str], log: Path) -> Forked:
    """Start `main(arguments)` in a process of its own."""
    process = _context().Process(target=_live, args=(main, arguments, str(log)), daemon=True)
    process.start()
    return Forked(process, log)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    before = {name: os.environ.get(name) for name in _ENVIRON}
    os.environ.update(_ENVIRON)
    try:
        ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _live(main: Main, arguments: list[str], log: str) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    sys.exit(main(arguments))
