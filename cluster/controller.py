"""One cluster from start to stop: checks, run folder, registry, Ray, workers, router.

check -> sweep dead runs -> open port -> run folder -> registry -> router | Ray, workers
      -> all ready -> watch ... stop asked, or something cannot be kept running
      -> router drains and ends -> workers end -> Ray ends -> leftovers end -> folder gone
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from cluster.config import ClusterConfig
from cluster.config_file import BadConfig
from cluster.events import ClusterReady, Report, RunSwept, Starting, Stopping
from cluster.failures import describe, first_error
from cluster.last_words import tail
from cluster.log_files import keep_small
from cluster.preflight import find_problems
from cluster.ray_pools import REAL_HOST, RayPools
from cluster.ray_runtime import RayRuntime, environment
from cluster.registry_server import serve_registry
from cluster.router_process import ROUTER_MODULE, RouterProcess, url_of
from cluster.run_dir import RunDir, runs_root
from cluster.sweep import end_processes, sweep_dead_runs
from cluster.telemetry import setup_logging
from core.clock import SystemClock
from core.errors import Unavailable
from core.ids import Role
from core.registry import MemoryRegistry
from router.serve import bind_listener

log = logging.getLogger(__name__)

_WORKER_STOP_S = 5.0
_LEFTOVERS_TERM_S = 2.0
_STDERR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What runs in the processes: the real ones, or smaller ones in tests of the controller."""

    worker_host: str = REAL_HOST
    router_module: str = ROUTER_MODULE
    checks: bool = True
    """Check the checkpoint and the GPUs before the start."""


class StopRequest:
    """Asked once, the cluster stops in order; asked twice, at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()
        self.reason = ""

    def ask(self, reason: str) -> None:
        """Callable from a signal handler of the event loop."""
        if self.asked.is_set():
            self.forced.set()
        else:
            self.reason = reason
            self.asked.set()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Inside the block SIGINT, SIGTERM and SIGHUP ask for a stop; SIGHUP not under nohup."""
        loop = asyncio.get_running_loop()
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        for number in signals:
            loop.add_signal_handler(number, self.ask, number.name)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)


async def run_cluster(
    config: ClusterConfig, stop: StopRequest, report: Report, parts: Parts | None = None
) -> None:
    """Run a cluster until a stop is asked for. Nothing of it is left afterwards.

    Raises BatonError: BadConfig before anything started, Unavailable when it could not start or
    could not be kept running.
    """
    parts = parts or Parts()
    root = runs_root()
    report(Starting(step="checking the set-up"))
    for run_id in await asyncio.to_thread(sweep_dead_runs, root):
        report(RunSwept(run_id=run_id))
    run = RunDir.create(root, config.model.name)
    try:
        with environment(run), _log_to(run, config):
            if parts.checks and (problems := await asyncio.to_thread(find_problems, config)):
                raise BadConfig(problems)
            if not stop.asked.is_set():
                await _run_checked(config, run, stop, report, parts)
    finally:
        await asyncio.to_thread(run.remove)


async def _run_checked(
    config: ClusterConfig, run: RunDir, stop: StopRequest, report: Report, parts: Parts
) -> None:
    with contextlib.closing(bind_listener(config.router.host, config.router.port)) as opened:
        try:
            cluster = _Cluster(config, run, opened=opened, stop=stop, report=report, parts=parts)
            await cluster.run()
        finally:
            await asyncio.to_thread(end_processes, run, _LEFTOVERS_TERM_S)


class _Cluster:
    """The living parts of one run."""

    def __init__(
        self,
        config: ClusterConfig,
        run: RunDir,
        *,
        opened: socket.socket,
        stop: StopRequest,
        report: Report,
        parts: Parts,
    ) -> None:
        self._config = config
        self._run = run
        self._url = url_of(opened)
        self._stop = stop
        self._report = report
        self._ray = RayRuntime(run)
        self._router = RouterProcess(config, run, opened, report=report, module=parts.router_module)
        self._pools = RayPools(
            config,
            run,
            self._ray,
            registry_address=run.registry_address,
            report=report,
            host=parts.worker_host,
        )
        self._began_s = time.monotonic()

    async def run(self) -> None:
        self._run.write_config(self._config.model_dump_json())
        self._run.update(router_url=self._url)
        async with contextlib.AsyncExitStack() as stack:
            try:
                await self._until_stopped(stack)
            finally:
                await self._shut_down()

    async def _until_stopped(self, stack: contextlib.AsyncExitStack) -> None:
        watching = asyncio.ensure_future(self._watch(stack))
        asked = asyncio.ensure_future(self._stop.asked.wait())
        try:
            await asyncio.wait({watching, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            watching.cancel()
            await asyncio.wait({watching, asked})
        if not watching.cancelled():
            watching.result()

    async def _watch(self, stack: contextlib.AsyncExitStack) -> None:
        """Start everything and keep it running; ends only with an error."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(
                    keep_small(self._run.logs, self._config.telemetry.log_max_mb << 20)
                )
                group.create_task(self._router.supervise())
                group.create_task(self._announce())
                self._report(Starting(step="Ray"))
                await self._ray.start(self._config)
                # Not before Ray: Ray forks this process, and gRPC's threads do not survive that.
                if self._config.registry.kind == "embedded":
                    registry = MemoryRegistry(SystemClock())
                    await stack.enter_async_context(
                        serve_registry(registry, self._run.registry_address)
                    )
                group.create_task(self._ray.watch())
                self._report(Starting(step=f"{self._config.num_workers} workers"))
                group.create_task(self._pools.supervise())
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors

    async def _announce(self) -> None:
        limit_s = self._config.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._pools.wait_ready()
                self._report(Starting(step="the router"))
                await self._router.wait_ready()
        except TimeoutError as error:
            raise Unavailable(self._not_ready(limit_s)) from error
        self._report(
            ClusterReady(
                run_id=self._run.run_id,
                url=self._url,
                model=self._config.model.name,
                startup_s=time.monotonic() - self._began_s,
            )
        )

    def _not_ready(self, limit_s: float) -> str:
        """What the start still waited for, with the ends of the logs, which go with the run."""
        logs: list[str]
        if missing := self._pools.missing():
            logs = [missing[0]]
            said = (
                f"{', '.join(missing)} not ready within {limit_s:g} s:"
                " raise start_timeout_s if the model is large"
            )
        else:
            logs = ["router", *(f"{role}-0" for role in Role)]
            said = (
                f"all workers serve, but in {limit_s:g} s (start_timeout_s) the router reached none"
                " of a role; does the registry answer them?"
            )
        ends = [f"the log of {name} ends with:\n{tail(self._run.log_path(name))}" for name in logs]
        return "\n".join([said, *ends])

    async def _shut_down(self) -> None:
        """Bounded: the drain time plus some 20 s. A second request to stop cuts it short."""
        reason = self._stop.reason or "a failure"
        self._report(Stopping(reason=reason, drain_s=self._config.drain_timeout_s))
        orderly = asyncio.ensure_future(self._stop_in_order())
        forced = asyncio.ensure_future(self._stop.forced.wait())
        try:
            await asyncio.wait({orderly, forced}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            forced.cancel()
            orderly.cancel()
            await asyncio.wait({orderly, forced})
        if not orderly.cancelled() and (error := orderly.exception()):
            log.error("stop_in_order_failed reason=%s", describe(error))

    async def _stop_in_order(self) -> None:
        drained_at_s = time.monotonic() + self._config.drain_timeout_s
        await self._router.stop(self._config.drain_timeout_s)
        # Other routers may have requests on these workers.
        await self._pools.stop(max(0.0, drained_at_s - time.monotonic()) + _WORKER_STOP_S)
        await self._ray.stop()


@contextlib.contextmanager
def _log_to(run: RunDir, config: ClusterConfig) -> Iterator[None]:
    """Inside the block logs, and what libraries print, go to the controller's log.

    File descriptor 1 stays the terminal's, for those who kept a stream on it.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with (
        _log_file(run) as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
        _native_stderr_to(stream),
    ):
        setup_logging("controller", config.telemetry, stream)
        log.info("controller_started pid=%d run_id=%s", os.getpid(), run.run_id)
        try:
            yield
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)


@contextlib.contextmanager
def _log_file(run: RunDir) -> Iterator[TextIO]:
    stream = run.log_path("controller").open("a", buffering=1)
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):  # on a full disk, which is not why the cluster ends
            stream.close()


@contextlib.contextmanager
def _native_stderr_to(stream: TextIO) -> Iterator[None]:
    kept = os.dup(_STDERR)
    os.dup2(stream.fileno(), _STDERR)
    try:
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
