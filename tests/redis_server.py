"""A real redis-server on a port of its own, for the tests that need one."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from redis import Redis
from redis.exceptions import RedisError

_START_S = 10.0
_TRIES = 5


class RedisServer:
    """Keeps nothing on disk, so whoever starts it again after `kill` finds it empty."""

    def __init__(self, folder: Path, password: str = "") -> None:
        self._folder = folder
        self._password = password
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        at = f":{self._password}@" if self._password else ""
        return f"redis://{at}127.0.0.1:{self.port}/0"

    @property
    def client(self) -> Redis:
        """A plain connection, to look and to meddle. Close it."""
        return Redis.from_url(self.url, socket_timeout=5)

    def start(self) -> None:
        """Return when it answers."""
        password = ("--requirepass", self._password) if self._password else ()
        self._process = subprocess.Popen(
            [
                _binary(),
                *("--port", str(self.port), "--bind", "127.0.0.1", "--save", ""),
                *("--appendonly", "no", "--dir", str(self._folder)),
                *password,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        give_up_at_s = time.monotonic() + _START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up_at_s:
                self.kill()
                raise RuntimeError(f"redis-server did not start on port {self.port}")
            time.sleep(0.01)

    def kill(self) -> None:
        """As the kernel would, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def freeze(self) -> None:
        """It keeps its connections and answers nothing, until `thaw`."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        with closing(self.client) as client:
            try:
                return bool(client.ping())
            except (RedisError, OSError):
                return False


@contextmanager
def redis_server(password: str = "") -> Iterator[RedisServer]:
    """Running inside the block, and gone after it."""
    with TemporaryDirectory(prefix="baton-redis-") as folder:
        for left in reversed(range(_TRIES)):
            server = RedisServer(Path(folder), password)
            try:
                server.start()
                break
            except RuntimeError:  # somebody else may have taken the port
                if not left:
                    raise
        try:
            yield server
        finally:
            server.kill()


def _binary() -> str:
    """Without redis-server a test fails where CI is set, and is skipped elsewhere."""
    found = shutil.which("redis-server")
    if found is None:
        reason = "redis-server is not installed: apt-get install redis-server"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        return int(taken.getsockname()[1])
