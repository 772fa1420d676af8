"""The router process. Any number of them serve the workers of one registry.

    python -m cluster.router_main --run-dir DIR --listen-fd N     started by the controller
    python -m cluster.router_main --config FILE [--port N]        by hand: another router

The controller gives it a socket that listens already, so clients never see a closed port while it
restarts. Its settings and the registry's address are in the run's folder. By hand it finds workers
in the Redis of its config, or where `--registry` says.
"""

import argparse
import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from random import Random

import uvloop
from opentelemetry import trace

from cluster.config import ClusterConfig, RegistryConfig
from cluster.config_file import load_config
from cluster.registries import connect_registry
from cluster.run_dir import RunDir
from cluster.telemetry import setup_logging, tracing
from core.clock import Clock, SystemClock
from core.errors import BatonError, ConfigError
from core.ids import new_incarnation
from core.registry import Registry
from engine.build import describe_model
from router.app import create_app
from router.descriptors import room_for_clients
from router.fleet import Fleet
from router.flow import Flow
from router.metrics import EdgeMetrics, FlowMetrics
from router.policies.base import Slo
from router.policies.build import build_policies
from router.progress import SequenceObserver
from router.serve import bind_listener, serve
from router.spans import SpanRecorder
from router.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_MEET_S = 2.0
_YOUNG_OBJECTS = 10_000
"""Made between two looks for cycles. A request's own objects mostly end with it, without one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 after SIGTERM or SIGINT, 1 for a bad set-up."""
    parser = _parser()
    parsed = parser.parse_args(arguments)
    if (parsed.run_dir is None) != (parsed.listen_fd is None):
        parser.error("--run-dir and --listen-fd go together")
    try:
        config = _config(parsed)
        setup_logging("router", config.telemetry, sys.stderr)
        with tracing("router", config.telemetry):
            uvloop.run(_main(config, parsed))
    except BatonError as error:
        log.error("router_failed reason=%s", error.message)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.router_main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--listen-fd", type=int)
    parser.add_argument("--config", type=Path, help="cluster config (YAML)")
    parser.add_argument("--port", type=int, help="wins over router.port; 0 takes a free one")
    parser.add_argument("--registry", help="host:port of an embedded registry")
    return parser


def _config(parsed: argparse.Namespace) -> ClusterConfig:
    if parsed.run_dir is not None:
        return ClusterConfig.model_validate_json((parsed.run_dir / "config.json").read_text())
    config = load_config(parsed.config, {} if parsed.port is None else {"router.port": parsed.port})
    if parsed.registry is None and config.registry.url is None:
        raise ConfigError(
            "a router started by hand finds no workers: set registry.kind to redis and"
            " registry.url, or give --registry"
        )
    return config


async def _main(config: ClusterConfig, parsed: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if parsed.run_dir is not None:
        listener = socket.socket(fileno=parsed.listen_fd)
        listener.setblocking(False)
        address = RunDir(parsed.run_dir).info().registry_address
    else:
        listener = bind_listener(config.router.host, config.router.port)
        address = parsed.registry or ""
        log.info("router_listens address=%s:%d", *listener.getsockname()[:2])
    place = config.registry if parsed.registry is None else RegistryConfig()
    async with connect_registry(place, address) as registry:
        await run_router(config, registry, listener, stop)


async def run_router(
    config: ClusterConfig, registry: Registry, listener: socket.socket, stop: asyncio.Event
) -> None:
    """Serve on `listener` until `stop`; closes it. Raises ConfigError for a bad checkpoint."""
    path, threads = config.model.path, config.router.tokenizer_threads
    with listener:
        model = await asyncio.to_thread(describe_model, path, config.engine)
        with closing(await asyncio.to_thread(Tokenizer.load, path, threads)) as tokenizer:
            clock, metrics = SystemClock(), EdgeMetrics()
            router_id = f"router-{new_incarnation()}"
            fleet = Fleet(
                registry,
                router_id=router_id,
                model_id=model.model_id,
                silence_s=config.router.worker_silence_s,
                hung_step_s=config.router.hung_step_s,
                index_bytes=config.router.index_max_mb * 1024 * 1024,
            )
            metrics.watch_index(fleet.index)
            flow = _flow(config, fleet, metrics, clock)
            app = create_app(
                flow,
                config.router,
                tokenizer,
                model=model,
                model_names=[config.model.name],
                clock=clock,
                metrics=metrics,
                explainer=flow if config.router.debug_routes else None,
            )
            # What is here stays: a full collection need not look at a million objects of imports.
            gc.collect()
            gc.freeze()
            gc.set_threshold(_YOUNG_OBJECTS, 20, 50)
            async with asyncio.TaskGroup() as group:
                following = group.create_task(fleet.run())
                # Clients that waited for a router to start again wait for its workers as well.
                await fleet.meet(_MEET_S)
                await serve(
                    app,
                    listener,
                    stop=stop,
                    grace_s=config.drain_timeout_s,
                    head_timeout_s=config.router.head_timeout_s,
                    max_connections=room_for_clients(
                        config.router.max_connections, config.num_workers
                    ),
                )
                following.cancel()


def _flow(config: ClusterConfig, fleet: Fleet, metrics: EdgeMetrics, clock: Clock) -> Flow:
    counted = FlowMetrics(metrics.registry)
    observers: list[SequenceObserver] = [counted]
    if config.telemetry.spans_file is not None:
        observers.append(SpanRecorder(trace.get_tracer("baton.router"), clock))
    slo = Slo(ttft_s=config.slo.ttft_ms / 1e3, tpot_s=config.slo.tpot_ms / 1e3)
    return Flow(
        fleet=fleet,
        policies=build_policies(config.router, slo),
        config=config.router,
        clock=clock,
        random=Random(),
        observers=observers,
        watcher=counted,
    )


if __name__ == "__main__":
    sys.exit(main())
