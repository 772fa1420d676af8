"""`baton demo`: a cluster as `baton up` starts it, real requests, and proof of every promise.

start -> chat of three turns, streamed -> two chats at once -> what each worker holds
      -> the same prompts through transformers -> stop -> tables, checks, exit status
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.config_file import load_config
from cluster.controller import StopRequest, run_cluster
from cluster.demo_chat import CHAT, MAX_TOKENS, SINGLE, Chat, Exchange
from cluster.demo_reference import Reference
from cluster.demo_view import Check, DemoView
from cluster.display import TerminalDisplay
from cluster.events import ClusterReady, Event, Report
from cluster.run_dir import RunDir, runs_root
from cluster.status import WorkerStatus
from cluster.status_view import read_status
from cluster.worker_control import GrpcWorkerControl
from core.errors import ConfigError

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model" / "checkpoint"

_RELEASE_S = 5.0
_ASK_S = 0.2
_INTERRUPTED = 130


def run_demo(config: Path | None, model: Path | None) -> int:
    """The exit status: 0 when every check held, 1 when one did not, 130 after a signal."""
    settings = _settings(config, model)
    console = Console(file=sys.stdout)
    view = DemoView(console)
    began_s = time.monotonic()
    with TerminalDisplay(console).shown() as report:
        result = asyncio.run(_in_a_cluster(settings, report, view))
    if result is None:
        return _INTERRUPTED
    view.stages(result.exchanges, result.identical)
    checks = _checks(result)
    view.checks(checks)
    failed = sum(not check.held for check in checks)
    view.heading(
        f"{failed} of {len(checks)} checks failed"
        if failed
        else f"all {len(checks)} checks held; the demo took {time.monotonic() - began_s:.0f} s"
    )
    return 1 if failed else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    exchanges: list[Exchange]
    identical: list[bool]
    workers: tuple[WorkerStatus, ...]


def _settings(config: Path | None, model: Path | None) -> ClusterConfig:
    overrides: dict[str, object] = {
        "engine.dtype": "float32",
        "router.local_prefill": False,  # on idle workers no prompt would cross, and that is shown
    }
    if config is None:
        overrides["router.port"] = 0
    if model is not None:
        overrides["model.path"] = model
    elif config is None:
        if not DEMO_MODEL.is_dir():
            raise ConfigError(
                f"the demo's own model is not at {DEMO_MODEL}: run from a checkout of the"
                " repository, or give --model DIR"
            )
        overrides["model.path"] = DEMO_MODEL
        overrides["model.served_name"] = "baton-demo"
    return load_config(config, overrides)


async def _in_a_cluster(config: ClusterConfig, report: Report, view: DemoView) -> _Result | None:
    """Run the requests while a cluster runs; None when a signal came first."""
    stop = StopRequest()
    ready: asyncio.Future[ClusterReady] = asyncio.get_running_loop().create_future()

    def heard(event: Event) -> None:
        report(event)
        if isinstance(event, ClusterReady) and not ready.done():
            ready.set_result(event)

    with stop.on_signals():
        cluster = asyncio.ensure_future(run_cluster(config, stop, heard))
        requests = asyncio.ensure_future(_requests(config, ready, view))
        asked = asyncio.ensure_future(stop.asked.wait())
        try:
            await asyncio.wait({cluster, requests, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            finished = requests.done()
            for task in (requests, asked):
                task.cancel()
            await asyncio.wait({requests, asked})
            if not stop.asked.is_set():
                stop.ask("the end of the demo")
            await cluster
    return requests.result() if finished else None


async def _requests(
    config: ClusterConfig, ready: "asyncio.Future[ClusterReady]", view: DemoView
) -> _Result:
    cluster = await ready
    keys = config.router.api_keys
    async with Chat(cluster.url, cluster.model, keys[0] if keys else "none") as chat:
        view.heading("a chat of three turns")
        exchanges = await chat.conversation(CHAT, view.turn)
        view.heading("\ntwo more at the same time")
        together = await chat.at_once(SINGLE)
    for exchange in together:
        view.answer(exchange)
    exchanges += together
    workers = await _workers_at_rest(RunDir(runs_root() / cluster.run_id))
    view.heading("the same prompts through transformers alone ...")
    identical = await asyncio.to_thread(_compare, config.model.path, exchanges)
    return _Result(exchanges=exchanges, identical=identical, workers=workers)


async def _workers_at_rest(run: RunDir) -> tuple[WorkerStatus, ...]:
    """The workers once no block is held any more, or as they are some seconds later."""
    control = GrpcWorkerControl()
    give_up_at_s = time.monotonic() + _RELEASE_S
    while True:
        workers = (await read_status(run, control)).workers
        busy = any(worker.stats is None or worker.stats.blocks.held for worker in workers)
        if not busy or time.monotonic() > give_up_at_s:
            return workers
        await asyncio.sleep(_ASK_S)


def _compare(checkpoint: Path, exchanges: Sequence[Exchange]) -> list[bool]:
    reference = Reference(checkpoint)
    return [
        reference.answer(exchange.messages, MAX_TOKENS) == exchange.text for exchange in exchanges
    ]


def _checks(result: _Result) -> list[Check]:
    turns = result.exchanges[: len(CHAT)]
    moved = [exchange.times.transfer_bytes for exchange in result.exchanges]
    read = sum(worker.stats.transfer_bytes for worker in result.workers if worker.stats)
    peers = [peer for worker in result.workers if worker.stats for peer in worker.stats.peers]
    ways = {peer.transport for peer in peers if peer.handoffs}
    fetched_bytes = sum(exchange.times.fetched_bytes for exchange in result.exchanges)
    fetched = sum(exchange.times.fetched_tokens for exchange in turns)
    cached = [exchange.times.cached_tokens for exchange in turns]
    return [
        Check(
            promise="every text is identical to transformers' own generate",
            held=all(result.identical) and all(exchange.text for exchange in result.exchanges),
        ),
        Check(
            promise="every request was prefilled on one process and decoded on another",
            held=all(
                exchange.times.prefill_worker != exchange.times.decode_worker
                and exchange.times.prefill_worker
                and exchange.times.decode_worker
                for exchange in result.exchanges
            )
            and all(moved),
            detail=f"{sum(moved) / 1024:.0f} KiB of KV moved",
        ),
        Check(
            promise=f"the bytes the workers read by {' and '.join(sorted(ways))} are those bytes",
            held=read == sum(moved) + fetched_bytes,
            detail=f"{read / 1024:.0f} KiB read",
        ),
        Check(
            promise="the second and third turn found their prefix in the cache",
            held=all(cached[1:]),
            detail=f"{', '.join(str(tokens) for tokens in cached)} tokens, "
            f"{fetched} of them read from another worker's cache",
        ),
        Check(
            promise="no KV block is held, and every pool adds up",
            held=all(
                worker.stats is not None
                and not worker.stats.blocks.held
                and not worker.stats.pool_error
                for worker in result.workers
            ),
        ),
    ]
