"""Keeps one worker running. Ray starts and restarts its process; this file says when it serves.

create --> ping: a process --> serve ... ready: WorkerReady
              ^                  |
              |                  | "" after a stop, a reason, or the process is gone
              +--- WorkerDied ---+---> before the first ready: WorkerFailed ends the start

A process that is ready and then hangs is killed (watchdog.py), and so one that is gone. One that
starts is not judged; start_timeout_s bounds that.
"""

import asyncio
import logging
import time
from typing import Any

import psutil

from cluster.backoff import Backoff
from cluster.events import Report, WorkerDied, WorkerReady
from cluster.last_words import last_words, tail
from cluster.ray_runtime import RayRuntime, import_ray
from cluster.watchdog import Silence, until_it_hangs
from cluster.worker_actor import LIFE_BEGINS, WorkerActor, WorkerEnd
from cluster.worker_spec import WorkerSpec
from core.clock import SystemClock
from core.errors import Unavailable

log = logging.getLogger(__name__)

_PROCESS_START_S = 120.0
_PING_S = 0.1
_KILLED_S = 10.0
_ACTOR_THREADS = 4  # serve and ready hold one each for long; all others end at once


class WorkerFailed(Unavailable):
    """A worker could not start; the message says which, why, and how its log ends."""


class WorkerKeeper:
    """One worker, over all its lives. `keep` runs as a task; `stop` comes once that has ended."""

    def __init__(self, spec: WorkerSpec, ray: RayRuntime, *, host: str, report: Report) -> None:
        self._spec = spec
        self._ray = ray
        self._host = host
        self._report = report
        self._backoff = Backoff(SystemClock())
        self._actor: Any = None
        self._serving: asyncio.Future[WorkerEnd] | None = None
        self._process: psutil.Process | None = None
        self._hung = ""
        self._started = False

    @property
    def _pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    async def keep(self) -> None:
        """Start the worker and restart it whenever it ends, for ever. Raises WorkerFailed."""
        self._actor = await self._ray.call(self._create)
        while True:
            began_s = time.monotonic()
            self._backoff.began()
            await self._new_process()
            end = await self._live(began_s)
            if not self._started:
                raise self._failure(end)
            restart_in_s = self._backoff.pause_s()
            self._tell_death(end.reason, restart_in_s)
            await asyncio.sleep(restart_in_s)

    async def stop(self, timeout_s: float) -> None:
        """Ask the worker to stop and wait until it has, or until `timeout_s` passed."""
        if self._serving is None:
            return
        self._actor.stop.remote()
        await asyncio.wait([self._serving], timeout=timeout_s)
        self._serving.cancel()

    def _create(self) -> Any:
        wanted = self._spec.config.resources
        actor = import_ray().remote(WorkerActor)
        return actor.options(
            name=self._spec.worker_id,
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            max_restarts=-1,
            max_concurrency=_ACTOR_THREADS,
        ).remote(self._spec, self._host)

    async def _new_process(self) -> None:
        """Wait for a process other than the last one."""
        try:
            async with asyncio.timeout(_PROCESS_START_S):
                self._process = await self._process_after(self._process)
        except TimeoutError as error:
            raise WorkerFailed(
                f"Ray did not start a process for {self._spec.worker_id} in"
                f" {_PROCESS_START_S:g} s; is the machine short of memory or processes?"
            ) from error

    async def _process_after(self, last: psutil.Process | None) -> psutil.Process:
        while True:
            process = await self._process_now()
            if process is not None and process != last:
                return process
            await asyncio.sleep(_PING_S)

    async def _process_now(self) -> psutil.Process | None:
        """The actor's process, None while there is none.

        It answers once more after it was looked up, so what was found is no later process of its
        pid; and psutil signals none of a later start.
        """
        try:
            pid: int = await self._actor.ping.remote()
            process = psutil.Process(pid)
            return process if await self._actor.ping.remote() == pid else None
        except import_ray().exceptions.RayActorError as error:
            log.info("worker_not_up worker_id=%s: %s", self._spec.worker_id, error)
        except psutil.Error as error:
            log.info("worker_gone worker_id=%s: %s", self._spec.worker_id, error)
        return None

    async def _live(self, began_s: float) -> WorkerEnd:
        """From `serve` to the end of the process."""
        serving = self._serving = _ask(self._actor.serve.remote())
        if await self._becomes_ready(serving):
            self._started = True
            self._backoff.serves()
            self._report(
                WorkerReady(
                    worker_id=self._spec.worker_id,
                    role=self._spec.role,
                    pid=self._pid,
                    startup_s=time.monotonic() - began_s,
                )
            )
        elif not serving.done():
            await self._end_process()
            timeout_s = self._spec.config.start_timeout_s
            return WorkerEnd(reason=f"it was not ready within {timeout_s:g} s", clear=False)
        self._hung = ""
        watching = asyncio.ensure_future(self._end_if_it_hangs())
        try:
            # Shielded: when supervision is cancelled the worker serves on, for `stop` to end.
            end: WorkerEnd = await asyncio.shield(serving)
        except import_ray().exceptions.RayActorError:
            reason = self._hung or last_words(self._spec.log, *self._life())
            return WorkerEnd(reason=reason, clear=False)
        finally:
            watching.cancel()
        await self._end_process()
        return end

    async def _end_if_it_hangs(self) -> None:
        """Kill the process if it hangs; its end is heard in `_live`, as any other."""
        timeout_s = self._spec.config.hang_timeout_s
        if not timeout_s:
            return
        try:
            silence = Silence(timeout_s, SystemClock())
            await until_it_hangs(lambda: _ask(self._actor.pulse.remote()), silence)
            worker_id, pid = self._spec.worker_id, self._pid
            log.warning(
                "worker_hangs worker_id=%s pid=%d silent_s=%.1f questions=%d: it is killed and"
                " started again",
                *(worker_id, pid, silence.silent_s, silence.missed),
            )
            self._hung = silence.reason
            self._kill()
            await asyncio.sleep(_KILLED_S)
            log.warning(
                "worker_outlives_kill worker_id=%s pid=%d: the kernel keeps it, in a driver"
                " perhaps; another takes its place once it is gone",
                *(worker_id, pid),
            )
        except Exception:
            log.exception("watchdog_failed worker_id=%s", self._spec.worker_id)

    def _kill(self) -> None:
        try:
            if self._process is not None:
                self._process.kill()
        except psutil.Error as error:
            log.info("worker_not_killed worker_id=%s: %s", self._spec.worker_id, error)

    async def _becomes_ready(self, serving: "asyncio.Future[WorkerEnd]") -> bool:
        timeout_s = self._spec.config.start_timeout_s
        ready = _ask(self._actor.ready.remote(timeout_s))
        try:
            await asyncio.wait(
                {serving, ready}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            return ready.done() and ready.exception() is None and bool(ready.result())
        finally:
            ready.cancel()

    async def _end_process(self) -> None:
        await self._ray.call(lambda: import_ray().kill(self._actor, no_restart=False))

    def _life(self) -> tuple[str, str]:
        """Where this process' part of the log begins and ends."""
        return f"{LIFE_BEGINS} pid={self._pid} ", LIFE_BEGINS

    def _failure(self, end: WorkerEnd) -> WorkerFailed:
        message = f"{self._spec.worker_id} could not start: {end.reason}"
        if not end.clear:
            message += f"\nits log ends with:\n{tail(self._spec.log, *self._life())}"
        return WorkerFailed(message)

    def _tell_death(self, reason: str, restart_in_s: float) -> None:
        spec = self._spec
        log.warning("worker_died worker_id=%s pid=%d reason=%s", spec.worker_id, self._pid, reason)
        self._report(
            WorkerDied(
                worker_id=spec.worker_id,
                pid=self._pid,
                reason=reason,
                log=spec.log,
                restart_in_s=restart_in_s,
            )
        )


def _ask(ref: Any) -> "asyncio.Future[Any]":
    """The answer to an actor call. A death is seen where it is awaited, and nowhere else."""

    async def answer() -> Any:
        return await ref

    def seen(task: "asyncio.Future[Any]") -> None:
        if not task.cancelled():
            task.exception()

    task = asyncio.ensure_future(answer())
    task.add_done_callback(seen)
    return task
