"""What the forked processes run: the routers' and workers' own mains, and workers with a fault."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

from cluster import router_main
from cluster.worker import __main__ as worker_main
from cluster.worker import host
from cluster.worker import worker as worker_module
from cluster.worker.outlet import RouterOutlet
from core.errors import BatonError
from core.messages import LoadReport
from engine import build
from engine.timed import TimedEngine
from engine.types import Sampled, SeqStep
from router import flow
from tests.faulty_worker import halt_on_signal

LEASE_S = 1.0
"""Of a worker's place in the registry; 10 s outside tests. It is renewed three times as often."""
SLOW_S = 1.0
"""So long slower than its peers, and a worker is ejected; 10 s outside tests."""
_FROZEN_STEP_S = 0.3
_SLOW_STEP_S = 0.06
"""Several times what steps take of those beside it."""


def run_router(arguments: list[str]) -> int:
    """`python -m cluster.router_main`"""
    return router_main.main(arguments)


def run_strict_router(arguments: list[str]) -> int:
    """A router that does not watch a slow worker for long."""
    lenient = flow._outlier_rules
    vars(flow).update(_outlier_rules=lambda config: replace(lenient(config), slow_s=SLOW_S))
    return run_router(arguments)


def run_worker(arguments: list[str]) -> int:
    """`python -m cluster.worker`, but with a short lease in the registry."""
    vars(host).update(_REGISTER_TTL_S=LEASE_S)
    sys.argv = ["cluster.worker", *arguments]
    return worker_main.main()


def run_frozen_worker(arguments: list[str]) -> int:
    """A worker that takes its time, and reports for ever that it is idle, as at its start."""
    vars(worker_module).update(RouterOutlet=FrozenOutlet)
    vars(build).update(TimedEngine=FrozenEngine)
    return run_worker(arguments)


def run_slow_worker(arguments: list[str]) -> int:
    """A worker that does all it is asked for, and says how it is, but takes its time."""
    vars(build).update(TimedEngine=SlowEngine)
    return run_worker(arguments)


def run_halting_worker(arguments: list[str]) -> int:
    """After SIGUSR1 its engine does not end a step until SIGUSR2; its event loop goes on."""
    halt_on_signal()
    return run_worker(arguments)


class FrozenOutlet(RouterOutlet):
    """Its heartbeats go on; their content is the first report's."""

    _first: LoadReport | None = None

    def report(self, load: LoadReport, now_s: float) -> None:
        self._first = self._first or load
        super().report(self._first, now_s)


class SlowEngine(TimedEngine):
    """Its steps are long."""

    longer_s = _SLOW_STEP_S

    def step(self, batch: Sequence[SeqStep]) -> list[Sampled | BatonError | None]:
        time.sleep(self.longer_s)
        return super().step(batch)


class FrozenEngine(SlowEngine):
    """Very long."""

    longer_s = _FROZEN_STEP_S
