"""Worker processes in a twentieth of a second: forked from one that has imported everything.

The zygote runs no thread, no event loop, no gRPC and no NIXL agent, so a fork of it is as good as a
fresh process that has done its imports. It forks on command and ends with the socket it was given;
what it forked ends with it.
"""

import ctypes
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from tests.faults.fault import Birth

_MESSAGE_BYTES = 65_536
_PR_SET_PDEATHSIG = 1
_START_TIMEOUT_S = 60.0
_FORK_TIMEOUT_S = 10.0


class Zygote:
    """The test's end. Started once per session; `close` ends it and all it forked."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = {
            **os.environ,
            "GRPC_ENABLE_FORK_SUPPORT": "0",
            # Threads of a library would not survive a fork.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environ,
        )
        theirs.close()
        self._socket.settimeout(_START_TIMEOUT_S)
        if self._socket.recv(_MESSAGE_BYTES) != b"ready":
            raise AssertionError("the zygote did not start")
        self._socket.settimeout(_FORK_TIMEOUT_S)

    def fork(self, birth: Birth) -> tuple[int, socket.socket]:
        """A new worker process: its pid, and the socket it listens to (worker.py)."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            text = json.dumps(asdict(birth)).encode()
            socket.send_fds(self._socket, [text], [theirs.fileno()])
            pid = int(self._socket.recv(_MESSAGE_BYTES))
        return pid, mine

    def close(self) -> None:
        self._socket.close()
        try:
            self._process.wait(_FORK_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_FORK_TIMEOUT_S)


def main(number: int) -> None:
    """Fork a worker per message until the other end is closed."""
    from tests.faults.worker import run_worker  # noqa: PLC0415 - only the zygote imports all this

    _load_ucs()
    threads = [entry.name for entry in Path("/proc/self/task").iterdir()]
    if len(threads) != 1:
        raise AssertionError(f"the zygote has {len(threads)} threads, a fork would lose them")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=number) as commands:
        commands.send(b"ready")
        while True:
            text, descriptors, _, _ = socket.recv_fds(commands, _MESSAGE_BYTES, 1)
            if not text:
                return
            pid = os.fork()
            if pid == 0:
                commands.close()
                control = socket.socket(fileno=descriptors[0])
                _live(Birth(**json.loads(text)), control, run_worker)
            os.close(descriptors[0])
            commands.send(str(pid).encode())


def _live(
    birth: Birth, control: socket.socket, run_worker: Callable[[Birth, socket.socket], int]
) -> NoReturn:
    """The life of a forked process; never returns into the zygote's code."""
    code = 70
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(birth.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.close(log)
        os.environ.update(birth.environ)
        code = run_worker(birth, control)
    except BaseException:  # noqa: BLE001 - the root of the process
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _load_ucs() -> None:
    """Load UCX's base library before the forks: its start alone takes 0.4 s of CPU.

    Without it (another wheel's layout) forks are slower, nothing else.
    """
    spec = find_spec("nixl_cu12")
    if spec is None or spec.origin is None:
        return
    libraries = Path(spec.origin).parent.parent / "nixl_cu12.libs"
    for path in libraries.glob("libucs-*.so*"):
        ctypes.CDLL(str(path), mode=os.RTLD_LAZY)


if __name__ == "__main__":
    main(int(sys.argv[1]))
