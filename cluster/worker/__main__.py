"""One worker by hand: `python -m cluster.worker --role prefill --config cluster.yaml`.

Prints its registry record as one JSON line when it serves, then logs to standard error. For a
worker outside Ray (another machine, a test); `baton up` starts the same code inside a Ray actor.
"""

import argparse
import asyncio
import json
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

import uvloop

from cluster.config import ClusterConfig
from cluster.config_file import load_config
from cluster.failures import describe, first_error
from cluster.redis_registry import RedisRegistry
from cluster.registries import connect_registry
from cluster.registry_client import RegistryClient
from cluster.telemetry import setup_logging
from cluster.worker.host import TransportsOf, WorkerStart, serve_worker
from cluster.worker.worker import WorkerSettings
from core.clock import SystemClock
from core.errors import BatonError
from core.ids import Role, WorkerId
from core.registry import WorkerRecord
from kv_transfer.transports import make_transports


def main(transports_of: TransportsOf = make_transports) -> int:
    """Exit status: 0 after SIGTERM or SIGINT, 1 for a bad set-up, as Python's for a bug."""
    arguments = _parser().parse_args()
    worker_id = WorkerId(arguments.worker_id or arguments.role)
    try:
        config = load_config(arguments.config)
        setup_logging(worker_id, config.telemetry, sys.stderr)
        uvloop.run(_serve(config, worker_id, arguments, transports_of))
    except Exception as error:
        if not isinstance(first_error(error), BatonError):
            raise
        print(f"error: {describe(error)}", file=sys.stderr)
        return 1
    return 0


async def _serve(
    config: ClusterConfig,
    worker_id: WorkerId,
    arguments: argparse.Namespace,
    transports_of: TransportsOf,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    transfer = config.transfer
    if arguments.network_domain is not None:
        transfer = transfer.model_copy(update={"network_domain": arguments.network_domain})
    start = WorkerStart(
        worker_id=worker_id,
        role=Role(arguments.role),
        model_path=config.model.path,
        settings=WorkerSettings(
            engine=config.engine,
            transfer=transfer,
            prefill=config.prefill,
            decode=config.decode,
            step_s=config.router.step_s(config.slo.tpot_ms / 1e3),
        ),
        drain_s=config.drain_timeout_s,
        host=arguments.host,
        port=arguments.port,
        router_port=arguments.router_port,
        peer_port=arguments.peer_port,
        metrics_port=config.telemetry.worker_metrics_port,
    )
    async with AsyncExitStack() as stack:
        registry: RegistryClient | RedisRegistry | None = None
        if arguments.registry:
            registry = await stack.enter_async_context(RegistryClient(arguments.registry))
        elif config.registry.url is not None:
            registry = await stack.enter_async_context(connect_registry(config.registry))
        await serve_worker(
            start,
            registry=registry,
            clock=SystemClock(),
            stop=stop,
            on_ready=_announce,
            transports_of=transports_of,
        )


def _announce(record: WorkerRecord) -> None:
    print(json.dumps(asdict(record)), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.worker", description=__doc__)
    parser.add_argument("--config", type=Path, help="cluster config (YAML)")
    parser.add_argument("--role", choices=[role.value for role in Role], required=True)
    parser.add_argument("--worker-id", help="name in the registry; the role if not given")
    parser.add_argument(
        "--registry",
        help="host:port of an embedded registry; else registry.url of the config; with neither:"
        " serve unregistered",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--router-port", type=int, default=0, help="of the door for routers")
    parser.add_argument("--peer-port", type=int, default=0, help="of the door for other workers")
    parser.add_argument("--network-domain", help="instead of transfer.network_domain")
    return parser


if __name__ == "__main__":
    sys.exit(main())
