"""A real worker whose seams do wrong what the test tells them to.

The socket it is given carries JSON lines. The test sends `{"arm": FAULT, "times": n, "each": n}`,
`{"go": FAULT}`, `{"collect": true}` to free what only Python's collector frees, or
`{"start_threads": true}` to fill the event loop's pool, each answered by `{"done": true}`. The
worker says `{"ready": record}` when it serves and `{"hit": FAULT}` whenever an armed fault happens.
"""

import asyncio
import gc
import json
import logging
import os
import socket
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import uvloop

from cluster.config_file import load_config
from cluster.worker import host
from cluster.worker import worker as worker_module
from cluster.worker.host import WorkerStart, serve_worker
from cluster.worker.worker import WorkerSettings
from core.clock import SystemClock
from core.errors import BatonError
from core.ids import Incarnation, Role, WorkerId
from core.registry import WorkerRecord
from core.stream import address_of, listen
from engine.arena import Arena
from engine.build import build_engine
from engine.config import EngineConfig
from engine.types import Engine
from kv_transfer.config import TransferConfig
from kv_transfer.messages import Seal
from kv_transfer.nixl import NixlTransport
from kv_transfer.seals import Seals
from kv_transfer.transports import Transports
from tests.faults.board import Board
from tests.faults.fault import Birth, Fault
from tests.faults.peers import FaultyOwner, FaultyReader
from tests.faults.steps import FaultyEngine
from tests.faults.transport import FaultyTransport


def run_worker(birth: Birth, control: socket.socket) -> int:
    """Serve until the control socket closes. The exit status, as of `python -m cluster.worker`."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")
    try:
        uvloop.run(_serve(birth, control))
    except BatonError as error:
        logging.error("worker_failed error=%s", error.message)
        return 1
    return 0


async def _serve(birth: Birth, control: socket.socket) -> None:
    commands, replies = await asyncio.open_unix_connection(sock=control)

    def say(**line: object) -> None:
        replies.write(json.dumps(line).encode() + b"\n")

    peers = _Listening()

    def ready(record: WorkerRecord) -> None:
        say(ready={**asdict(record), "peer_address": peers.address})

    board = Board(lambda fault: say(hit=fault))
    _wire(board, peers)
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(_obey(commands, replies, board, stop))
        await serve_worker(
            _start(birth),
            registry=None,
            clock=SystemClock(),
            stop=stop,
            on_ready=ready,
            transports_of=partial(_transports, board),
        )
    replies.close()


class FaultySeals(Seals):
    """They stay whole where the board says so."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self._board = board

    def break_one(self, seal: Seal) -> None:
        if not self._board.take(Fault.SEALS_STAY):
            super().break_one(seal)


class _Listening:
    """Remembers where the worker listens for other workers."""

    address = ""

    def __call__(self, host: str, port: int) -> socket.socket:
        listener = listen(host, port)
        self.address = address_of(listener)
        return listener


def _wire(board: Board, peers: _Listening) -> None:
    """Put the faulty parts where the worker looks for its own; this process has no other use."""

    def engine_of(directory: Path, config: EngineConfig) -> Engine:
        return FaultyEngine(build_engine(directory, config), board)

    vars(host).update(build_engine=engine_of, listen=peers)
    vars(worker_module).update(
        Owner=partial(FaultyOwner, board), Reader=partial(FaultyReader, board)
    )


def _transports(
    board: Board, config: TransferConfig, arena: Arena, incarnation: Incarnation, _host: str
) -> Transports:
    seals = FaultySeals(board)
    nixl = NixlTransport(arena, incarnation, config.read_timeout_s, seals)
    return Transports([FaultyTransport(nixl, arena, board)], seals)


def _start(birth: Birth) -> WorkerStart:
    config = load_config(Path(birth.config))
    return WorkerStart(
        worker_id=WorkerId(birth.worker_id),
        role=Role(birth.role),
        model_path=config.model.path,
        settings=WorkerSettings(
            engine=config.engine,
            transfer=config.transfer,
            prefill=config.prefill,
            decode=config.decode,
        ),
        drain_s=config.drain_timeout_s,
        router_port=birth.ports[0],
        peer_port=birth.ports[1],
    )


async def _obey(
    commands: asyncio.StreamReader,
    replies: asyncio.StreamWriter,
    board: Board,
    stop: asyncio.Event,
) -> None:
    while line := await commands.readline():
        command = json.loads(line)
        if "arm" in command:
            board.arm(Fault(command["arm"]), command["times"], command["each"])
        elif "collect" in command:
            gc.collect()
        elif "start_threads" in command:
            await _start_threads()
        else:
            board.go(Fault(command["go"]))
        replies.write(b'{"done": true}\n')
    stop.set()


async def _start_threads() -> None:
    """A pool starts a thread whenever one is asked for and none is idle, up to its bound."""
    most = min(32, (os.cpu_count() or 1) + 4)  # ThreadPoolExecutor's own bound
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.05) for _ in range(most)))
