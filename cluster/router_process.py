"""The router as a child process that is started again when it dies, and killed when it hangs.

The controller opens the port and keeps it: a second cluster learns at once that it is taken, and
clients of a router that starts or restarts wait in the socket's queue instead of being refused.
The child finds the socket as its file descriptor `--listen-fd`.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from contextlib import suppress

from cluster.backoff import Backoff
from cluster.config import ClusterConfig
from cluster.events import Report, RouterDied
from cluster.last_words import last_words, tail
from cluster.probe import answers, answers_ready
from cluster.run_dir import RunDir
from cluster.watchdog import Silence, until_it_hangs
from core.clock import SystemClock
from core.errors import Unavailable

log = logging.getLogger(__name__)

ROUTER_MODULE = "cluster.router_main"

_MOST_FAILURES = 5
"""In a row."""
_PROBE_EVERY_S = 0.1
_KILL_AFTER_S = 3.0
_ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class RouterFailed(Unavailable):
    """The router could not start, or dies again and again; the message says why."""


def url_of(opened: socket.socket) -> str:
    """Where clients on this machine reach the socket."""
    host, port = opened.getsockname()[:2]
    host = _ANY_ADDRESS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class RouterProcess:
    """`supervise` is its only task; `stop` comes once that has ended."""

    def __init__(
        self,
        config: ClusterConfig,
        run: RunDir,
        opened: socket.socket,
        *,
        report: Report,
        module: str = ROUTER_MODULE,
    ) -> None:
        self._config = config
        self._run = run
        self._socket = opened
        self._report = report
        self._module = module
        self._log = run.log_path("router")
        self._process: asyncio.subprocess.Process | None = None
        self._started = False
        self._hung = ""
        self._heard = 0
        """Answers to the watchdog."""

    @property
    def pid(self) -> int | None:
        """Of the present process, or the last one."""
        return None if self._process is None else self._process.pid

    async def supervise(self) -> None:
        """Start the router and restart it whenever it ends, for ever. Raises RouterFailed."""
        backoff = Backoff(SystemClock())
        while True:
            backoff.began()
            process = self._process = await self._start()
            self._hung = ""
            watching = asyncio.ensure_future(self._end_if_it_hangs(process, backoff))
            try:
                status = await process.wait()
            finally:
                watching.cancel()
            reason = self._hung or self._reason(status)
            if not self._started:
                raise RouterFailed(f"the router could not start: {reason}\n{self._log_end()}")
            restart_in_s = backoff.pause_s()
            if backoff.failures > _MOST_FAILURES:
                raise RouterFailed(f"the router dies again and again: {reason}\n{self._log_end()}")
            log.warning("router_died pid=%d reason=%s", process.pid, reason)
            self._report(
                RouterDied(pid=process.pid, reason=reason, log=self._log, restart_in_s=restart_in_s)
            )
            await asyncio.sleep(restart_in_s)

    async def wait_ready(self) -> None:
        """Return when /ready answers 200; bounded by the caller."""
        while not self._started:
            await asyncio.sleep(_PROBE_EVERY_S)
            self._started = await answers_ready(url_of(self._socket))

    async def stop(self, drain_s: float) -> None:
        """SIGTERM; SIGKILL when requests in flight take longer than `drain_s` to finish.

        New clients are refused from here on, instead of waiting for a router that will not come.
        """
        self._socket.close()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), drain_s + _KILL_AFTER_S)
        except TimeoutError:
            log.warning("router_killed pid=%d", process.pid)
            process.kill()
            await process.wait()

    async def _end_if_it_hangs(self, process: asyncio.subprocess.Process, backoff: Backoff) -> None:
        """Kill a router that is not there in time, or answers nothing any more."""
        start_s, hang_s = self._config.start_timeout_s, self._config.hang_timeout_s
        try:
            if await self._is_there(start_s):
                backoff.serves()
                if not hang_s:
                    return
                silence = Silence(hang_s, SystemClock())
                await until_it_hangs(self._ask, silence)
                self._hung = silence.reason
            else:
                self._hung = f"it answered nothing within {start_s:g} s (start_timeout_s)"
            log.warning("router_hangs pid=%d: %s", process.pid, self._hung)
            with suppress(ProcessLookupError):
                process.kill()
        except Exception:
            log.exception("watchdog_failed pid=%d", process.pid)

    async def _is_there(self, timeout_s: float) -> bool:
        """Wait until it answers, whatever that is."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not await answers(url_of(self._socket)):  # noqa: ASYNC110
                    await asyncio.sleep(_PROBE_EVERY_S)
                return True
        return False

    def _ask(self) -> "asyncio.Future[int]":
        async def answer() -> int:
            # A late answer is an answer: it is waited for until all questions are given up.
            if not await answers(url_of(self._socket), self._config.hang_timeout_s):
                raise TimeoutError
            self._heard += 1
            return self._heard

        return asyncio.ensure_future(answer())

    async def _start(self) -> asyncio.subprocess.Process:
        environment = dict(os.environ)
        if not self._config.resources.gpus:
            # Router and workers must agree on what the checkpoint becomes on their device.
            environment["CUDA_VISIBLE_DEVICES"] = ""
        descriptor = self._socket.fileno()
        with self._log.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cluster.child", str(os.getpid()), self._module),
                *("--run-dir", str(self._run.path), "--listen-fd", str(descriptor)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=(descriptor,),
                start_new_session=True,
            )

    def _reason(self, status: int) -> str:
        if status >= 0:
            return f"it ended with status {status}"
        said = last_words(self._log)
        return said if "crashed" in said else f"it was killed by {signal.Signals(-status).name}"

    def _log_end(self) -> str:
        return f"its log ends with:\n{tail(self._log)}"
