"""Peers as processes: started with the workers they need, all alive at once, ended together."""

from __future__ import annotations

import asyncio
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.router.client import Client, chat_body
from benchmarks.router.peers.catalog import LOOPBACK, Engine, Peer, Ports, start_of
from benchmarks.router.rig import MODEL
from benchmarks.servers import Server, server
from benchmarks.types import BenchFailed

WORKERS = 2
"""Prefill workers, and as many decode workers."""
_READY_TIMEOUT_S = 60.0
_ASK_TIMEOUT_S = 5.0
_ASK_EVERY_S = 0.2
_ASKED_TOKENS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFront:
    """One running peer, as the load sees it. Its workers are mocks of ours, or its own."""

    peer: Peer
    port: int
    router: Server
    workers: tuple[Server, ...]

    def cpu_s(self) -> float:
        return self.router.cpu_s()

    def workers_cpu_s(self) -> float:
        return sum(worker.cpu_s() for worker in self.workers)

    def step(self, step_s: float) -> None:
        """Dynamo's mock engine runs at its own greatest speed."""
        if self.peer.engine is not Engine.OWN:
            self.workers[0].tell(f"step {step_s}")


def begin(stack: ExitStack, peer: Peer, model_name: str) -> PeerFront:
    """Start its processes; `ready` tells when they serve. Raises BenchFailed."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-peer-")))
    ports = _free_ports()
    planes = folder / "planes"
    planes.mkdir()
    start = start_of(peer, ports, MODEL, model_name, planes)
    if peer.engine is Engine.OWN:
        workers = [
            stack.enter_context(
                server(
                    f"worker-{i}",
                    command,
                    folder,
                    environment=start.environment,
                    logs_stdout=True,
                )
            )
            for i, command in enumerate(start.workers)
        ]
    else:
        workers = [stack.enter_context(server("mocks", _mocks(peer, model_name, ports), folder))]
        workers[0].first_line()
    router = stack.enter_context(
        server(peer.name, start.router, folder, environment=start.environment, logs_stdout=True)
    )
    return PeerFront(peer=peer, port=ports.http, router=router, workers=tuple(workers))


def _mocks(peer: Peer, model_name: str, ports: Ports) -> Sequence[str]:
    joined = [",".join(map(str, some)) for some in (ports.prefill, ports.decode)]
    module = "benchmarks.router.peers.engine"
    return [sys.executable, "-m", module, peer.engine.value, model_name, *joined]


def _free_ports() -> Ports:
    """Of loopback; all are held until all are known, so that they differ."""
    with ExitStack() as held:
        numbers: list[int] = []
        for _ in range(2 + 3 * WORKERS):
            some = held.enter_context(socket.socket())
            some.bind((LOOPBACK, 0))
            numbers.append(some.getsockname()[1])
    http, metrics, *others = numbers
    return Ports(
        http=http,
        metrics=metrics,
        bootstrap=tuple(others[:WORKERS]),
        prefill=tuple(others[WORKERS : 2 * WORKERS]),
        decode=tuple(others[2 * WORKERS :]),
    )


async def ready(front: PeerFront, model_name: str) -> None:
    """Wait until it streams a whole answer. Raises BenchFailed with its last words."""
    body = chat_body(model_name, "Are you there?", _ASKED_TOKENS)
    give_up_s, reason = time.monotonic() + _READY_TIMEOUT_S, "it was not asked"
    while time.monotonic() < give_up_s:
        for process in (front.router, *front.workers):
            if not process.running:
                raise BenchFailed(f"{process.name} ended: {_last_line(process)}")
        try:
            async with asyncio.timeout(_ASK_TIMEOUT_S):
                client = await Client.connect(front.port)
                try:
                    if (await client.ask(body)).events >= _ASKED_TOKENS:
                        return
                    reason = f"it answered with fewer than {_ASKED_TOKENS} tokens"
                finally:
                    client.close()
        except (OSError, TimeoutError, BenchFailed) as error:
            reason = str(error) or "it did not answer in time"
        await asyncio.sleep(_ASK_EVERY_S)
    raise BenchFailed(f"not ready after {_READY_TIMEOUT_S:g} s: {reason}")


def _last_line(process: Server) -> str:
    lines = process.last_words().strip().splitlines()
    return lines[-1].strip() if lines else "without a word"
