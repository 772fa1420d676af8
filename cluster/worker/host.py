"""The worker process: build the engine, open the door, register, serve until told to stop."""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from cluster.worker.metrics import serving_metrics
from cluster.worker.router_door import serving_routers
from cluster.worker.server import add_worker_service
from cluster.worker.worker import Worker, WorkerIdentity, WorkerSettings
from core.channel import SERVER_OPTIONS
from core.clock import Clock
from core.errors import ConfigError, Unavailable
from core.ids import Incarnation, Role, WorkerId, new_incarnation
from core.registry import Registry, WorkerRecord
from core.stream import address_of, listen, place_of
from engine.arena import Arena
from engine.build import build_engine
from engine.sizing import describe_arena
from kv_transfer.config import TransferConfig
from kv_transfer.server import serving_peers
from kv_transfer.transports import Transports

log = logging.getLogger(__name__)

_REGISTER_TTL_S = 10.0
_REGISTER_TIMEOUT_S = 3.0
_FAILURES_PER_LINE = 18
_STOP_GRACE_S = 0.5


TransportsOf = Callable[[TransferConfig, Arena, Incarnation, str], Transports]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStart:
    """What one worker process is told."""

    worker_id: WorkerId
    role: Role
    model_path: Path
    settings: WorkerSettings
    drain_s: float
    """At a stop, open legs may end for so long."""
    host: str = "127.0.0.1"
    port: int = 0
    router_port: int = 0
    peer_port: int = 0
    metrics_port: int | None = None


async def serve_worker(
    start: WorkerStart,
    *,
    registry: Registry | None,
    clock: Clock,
    stop: asyncio.Event,
    on_ready: Callable[[WorkerRecord], None],
    transports_of: TransportsOf,
) -> None:
    """Serve until `stop`. Raises what ended the engine loop, ConfigError for a bad set-up."""
    _check_host(start.host)
    incarnation = new_incarnation()
    engine = await asyncio.to_thread(build_engine, start.model_path, start.settings.engine)
    info = engine.info
    log.info(
        "engine_ready model_id=%s %s",
        info.model_id,
        describe_arena(info.num_blocks, info.layout, info.context_tokens),
    )
    server = grpc.aio.server(options=SERVER_OPTIONS)
    port = _bind(server, start)
    routers, peers = listen(start.host, start.router_port), listen(start.host, start.peer_port)
    identity = WorkerIdentity(
        worker_id=start.worker_id,
        incarnation=incarnation,
        address=place_of((start.host, port)),
        peer_address=address_of(peers),
        network_domain=start.settings.transfer.network_domain,
    )
    worker = Worker(
        engine=engine,
        transports=transports_of(start.settings.transfer, engine.arena, incarnation, start.host),
        identity=identity,
        role=start.role,
        settings=start.settings,
        clock=clock,
    )
    record = WorkerRecord(
        worker_id=start.worker_id,
        incarnation=incarnation,
        role=start.role,
        epoch=1,
        address=identity.address,
        router_address=address_of(routers),
        model_id=info.model_id,
        pid=os.getpid(),
        network_domain=identity.network_domain,
    )
    async with (
        worker.running() as engine_loop,
        serving_peers(peers, worker.owner, worker.peer_hello, worker.arena),
        serving_routers(routers, worker),
    ):
        with serving_metrics(worker, start.host, start.metrics_port) as metrics_address:
            add_worker_service(server, worker, clock, metrics_address)
            await server.start()
            try:
                log.info("worker_ready worker_id=%s address=%s", start.worker_id, identity.address)
                on_ready(record)
                await _serve(registry, record, stop, engine_loop)
                left = await _drain(worker, start.drain_s, engine_loop)
                log.info("worker_drained legs_left=%d", left)
            finally:
                await server.stop(_STOP_GRACE_S)


async def _serve(
    registry: Registry | None,
    record: WorkerRecord,
    stop: asyncio.Event,
    engine_loop: "asyncio.Task[None]",
) -> None:
    """Stay registered until told to stop, or until the engine loop has failed."""
    stopped = asyncio.create_task(stop.wait())
    registered = asyncio.create_task(_stay_registered(registry, record))
    try:
        done, _ = await asyncio.wait(
            {stopped, registered, engine_loop}, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()
    finally:
        for task in (stopped, registered):
            task.cancel()
        await asyncio.wait({stopped, registered})
        if registry is not None:
            await _deregister(registry, record)


async def _drain(worker: Worker, drain_s: float, engine_loop: "asyncio.Task[None]") -> int:
    """Legs left open; or raises what ended the engine loop meanwhile: they would end no more."""
    draining = asyncio.create_task(worker.drain(drain_s))
    try:
        await asyncio.wait({draining, engine_loop}, return_when=asyncio.FIRST_COMPLETED)
        if engine_loop.done():
            engine_loop.result()
        return await draining
    finally:
        draining.cancel()


async def _stay_registered(registry: Registry | None, record: WorkerRecord) -> None:
    """Register and renew for ever; a registry that is away is only logged, about once a minute."""
    failures = 0
    while True:
        if registry is not None:
            try:
                async with asyncio.timeout(_REGISTER_TIMEOUT_S):
                    await registry.register(record, _REGISTER_TTL_S)
            except (Unavailable, TimeoutError) as error:
                if failures % _FAILURES_PER_LINE == 0:
                    log.warning(
                        "registry_unreachable worker_id=%s failures=%d reason=%r: it serves on, but"
                        " routers that start now do not find it",
                        record.worker_id,
                        failures + 1,
                        _reason(error),
                    )
                failures += 1
            else:
                if failures:
                    log.warning(
                        "registry_back worker_id=%s failures=%d", record.worker_id, failures
                    )
                failures = 0
        await asyncio.sleep(_REGISTER_TTL_S / 3)


def _reason(error: Unavailable | TimeoutError) -> str:
    return str(error) or f"nothing came within {_REGISTER_TIMEOUT_S:g} s"


async def _deregister(registry: Registry, record: WorkerRecord) -> None:
    try:
        async with asyncio.timeout(_REGISTER_TIMEOUT_S):
            await registry.deregister(record.worker_id, record.incarnation)
    except (Unavailable, TimeoutError) as error:
        log.info("registry_unreachable_at_exit reason=%r", _reason(error))


def _check_host(host: str) -> None:
    if host in {"", "0.0.0.0", "::"}:
        raise ConfigError(
            f"the host {host!r} is every address of this machine, and routers and other workers are"
            " told where to reach the worker: give one address that they reach (--host)"
        )


def _bind(server: grpc.aio.Server, start: WorkerStart) -> int:
    try:
        return server.add_insecure_port(place_of((start.host, start.port)))
    except RuntimeError as error:
        raise ConfigError(
            f"worker {start.worker_id} cannot listen on {start.host}:{start.port}; "
            "is the port in use?"
        ) from error
