"""Child processes of a bench in some 20 ms: forked from one that has imported everything.

An import of torch takes two seconds of a core, and `bench transfer` needs seven processes with it.
The zygote runs no thread, no event loop and no NIXL agent, so a fork of it is as good as a fresh
process that has done its imports; UCX, which reads its settings when it is loaded, is loaded after.
It forks on command and ends with the socket it was given; what it forked ends with it.
"""

import array
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import NoReturn

import psutil

from benchmarks.types import BenchFailed
from core.parent import end_with_parent

_PRELOAD = ("benchmarks.transfer.bench", "benchmarks.child", "cluster.worker.__main__")
_MESSAGE_BYTES = 65_536
_MOST_DESCRIPTORS = 8
_START_TIMEOUT_S = 120.0
_FORK_TIMEOUT_S = 10.0
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Birth:
    """Bench to zygote, with descriptors: standard output, standard error, and those whose numbers
    follow the arguments.
    """

    module: str
    arguments: Sequence[str]
    environment: Mapping[str, str]


class Zygote:
    """The bench's end, open inside `with`; the process starts with the first fork."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def fork(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        output: int,
        errors: int,
        descriptors: Sequence[int] = (),
    ) -> "Forked":
        """Run the `main` of `module`, in a session of its own: Ctrl-C is the bench's to handle.
        `environment` is set beside the bench's own; copies of `descriptors` are passed, and
        their numbers follow the arguments. Raises BenchFailed.
        """
        birth = _Birth(module, tuple(arguments), dict(environment))
        commands = self._started()
        try:
            numbers = array.array("i", [output, errors, *descriptors])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)]
            commands.sendmsg([json.dumps(asdict(birth)).encode()], rights)
            pid = int(commands.recv(_MESSAGE_BYTES))
        except (OSError, ValueError) as error:
            self._stop()  # a late answer would be taken for that to the next command
            raise BenchFailed(f"no process could be started for {module}: {error}") from error
        return Forked(pid)

    def _started(self) -> socket.socket:
        if self._socket is None:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                self._start(self._socket, theirs)
            except OSError as error:
                self._stop()
                raise BenchFailed(f"no process to fork others from: {error}") from error
            finally:
                theirs.close()
        return self._socket

    def _start(self, commands: socket.socket, theirs: socket.socket) -> None:
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "GRPC_ENABLE_FORK_SUPPORT": "0"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **one_thread},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()  # or the end of that process would not be seen here
        commands.settimeout(_START_TIMEOUT_S)
        if commands.recv(_MESSAGE_BYTES) != b"ready":
            raise OSError("it ended while it imported")
        commands.settimeout(_FORK_TIMEOUT_S)

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            try:
                self._process.wait(_STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(_STOP_TIMEOUT_S)
        self._socket = self._process = None


class Forked:
    """A process of the zygote, which reaps it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.NoSuchProcess:
            self._process = None

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def join(self, timeout_s: float) -> None:
        """Wait for its end, and bring it about after `timeout_s`."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except psutil.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait(timeout_s)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.is_running():
            try:
                self._process.send_signal(number)
            except psutil.NoSuchProcess:
                return


# -- the process --------------------------------------------------------------------------------


def main(number: int) -> None:
    """Fork per message until the other end is closed."""
    for module in _PRELOAD:
        importlib.import_module(module)
    zygote = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=number) as commands:
        with suppress(BrokenPipeError):  # given up before it was ready: then nothing comes
            commands.send(b"ready")
        while True:
            text, descriptors, _, _ = socket.recv_fds(commands, _MESSAGE_BYTES, _MOST_DESCRIPTORS)
            if not text:
                return
            pid = os.fork()
            if pid == 0:
                commands.close()
                _live(zygote, _Birth(**json.loads(text)), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            commands.send(str(pid).encode())


def _live(zygote: int, birth: _Birth, descriptors: Sequence[int]) -> NoReturn:
    """The life of a forked process; never returns into the zygote's code."""
    code = 1
    try:
        end_with_parent(zygote)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for stream, descriptor in zip((1, 2), descriptors, strict=False):
            os.dup2(descriptor, stream)
            os.close(descriptor)
        os.environ.update(birth.environment)
        sys.argv = [birth.module, *birth.arguments, *map(str, descriptors[2:])]
        code = int(importlib.import_module(birth.module).main() or 0)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the root of the process
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError):  # nobody reads it any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
