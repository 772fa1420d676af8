"""The Ray actor around a worker host: its process, its log, its last words."""

import faulthandler
import importlib
import logging
import os
import sys
import threading
from dataclasses import dataclass

from cluster.failures import describe, first_error
from cluster.telemetry import setup_logging
from cluster.worker_spec import Pulse, RunSoon, StopSignal, WorkerHost, WorkerSpec
from core.errors import UserError

log = logging.getLogger(__name__)

LIFE_BEGINS = "worker_process_started"
"""The log's first event of one life: what follows, up to the next one, is of this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnd:
    """How `serve` ended. `reason` is empty after a stop; `clear` says it needs no log beside it."""

    reason: str
    clear: bool


class WorkerActor:
    """One worker process. `ping` answers at once; `serve` lasts as long as the worker.

    The driver calls `serve` once per life, beside it `ready`, then `pulse` now and then, and `stop`
    at the end. After `serve` has returned the process is of no more use.
    """

    def __init__(self, spec: WorkerSpec, host: str) -> None:
        """`host` names a WorkerHost as `module:function`."""
        self._spec = spec
        self._host = host
        self._stop = StopSignal()
        self._ready = threading.Event()
        self._pulse = Pulse()
        _redirect_output(spec)
        if not spec.config.resources.gpus:
            # Workers without a GPU of their own must not meet on the first one they see.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        log.info("%s pid=%d role=%s", LIFE_BEGINS, os.getpid(), spec.role)

    def ping(self) -> int:
        """The process is up; gives its pid."""
        return os.getpid()

    def serve(self) -> WorkerEnd:
        """Run the host to its end."""
        try:
            _load(self._host)(self._spec, self._stop, self._serves)
        except Exception as error:
            reason = describe(error)
            if isinstance(first_error(error), UserError):
                log.error("worker_failed reason=%s", reason)
                return WorkerEnd(reason=reason, clear=True)
            log.exception("worker_failed")
            return WorkerEnd(reason=reason, clear=False)
        reason = "" if self._stop.requested else "it ended by itself"
        return WorkerEnd(reason=reason, clear=False)

    def ready(self, timeout_s: float) -> bool:
        """Wait until the worker serves; False when `timeout_s` passed first."""
        return self._ready.wait(timeout_s)

    def pulse(self) -> int:
        """Answers at once; more than last time: the host's event loop has turned since."""
        return self._pulse.ask()

    def stop(self) -> None:
        """Ask the host to end; `serve` then returns."""
        self._stop.request()

    def _serves(self, run_soon: RunSoon) -> None:
        self._pulse.of(run_soon)
        self._ready.set()


def _redirect_output(spec: WorkerSpec) -> None:
    """Everything the process writes, native crashes included, goes to its log."""
    stream = spec.log.open("a", buffering=1)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    sys.stdout = sys.stderr = stream
    faulthandler.enable(stream)
    setup_logging(spec.worker_id, spec.config.telemetry, stream)


def _load(path: str) -> WorkerHost:
    module, _, name = path.partition(":")
    host: WorkerHost = getattr(importlib.import_module(module), name)
    return host
