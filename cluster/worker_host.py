"""The WorkerHost of a real cluster: cluster/worker on an event loop of its own."""

import asyncio
from collections.abc import Callable

import uvloop

from cluster.registries import connect_registry
from cluster.worker.host import WorkerStart, serve_worker
from cluster.worker.worker import WorkerSettings
from cluster.worker_spec import RunSoon, StopSignal, WorkerSpec
from core.clock import SystemClock
from kv_transfer.transports import make_transports


def host_worker(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    """A WorkerHost."""
    uvloop.run(_serve(spec, stop, ready))


async def _serve(spec: WorkerSpec, stop: StopSignal, ready: Callable[[RunSoon], None]) -> None:
    config = spec.config
    start = WorkerStart(
        worker_id=spec.worker_id,
        role=spec.role,
        model_path=config.model.path,
        settings=WorkerSettings(
            engine=config.engine,
            transfer=config.transfer,
            prefill=config.prefill,
            decode=config.decode,
            step_s=config.router.step_s(config.slo.tpot_ms / 1e3),
        ),
        drain_s=config.drain_timeout_s,
        host=spec.host,
        metrics_port=config.telemetry.worker_metrics_port,
    )
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        loop.call_soon_threadsafe(stopped.set)

    with stop.wakes(wake):
        async with connect_registry(config.registry, spec.registry_address) as registry:
            await serve_worker(
                start,
                registry=registry,
                clock=SystemClock(),
                stop=stopped,
                on_ready=lambda _record: ready(loop.call_soon_threadsafe),
                transports_of=make_transports,
            )
