"""A whole worker inside a measuring process: engine, runner, roles and its door for peers.

The router's side is played here, without gRPC: submits go in by `handle`, what the worker says
comes out of its outlet with the time it was said.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from benchmarks.transfer.rig import HOST, make_transport
from benchmarks.transfer.watch import WatchedTransport
from benchmarks.types import BenchFailed
from cluster.worker.outlet import RouterOutlet
from cluster.worker.worker import Worker, WorkerIdentity, WorkerSettings
from core.clock import SystemClock
from core.errors import BatonError
from core.ids import Incarnation, Role, WorkerId, new_incarnation
from core.messages import (
    Accepted,
    LegFailed,
    LegTokens,
    Rejected,
    RouterToWorker,
    TokenFrame,
    WorkerToRouter,
)
from core.stream import address_of, listen
from decode_worker.config import DecodeConfig
from engine.arena import Arena
from engine.config import EngineConfig
from engine.timed import TimedEngine
from engine.types import EngineInfo, Sampled, SeqStep
from kv_transfer.config import TransferConfig
from kv_transfer.seals import Seals
from kv_transfer.server import serving_peers
from kv_transfer.transports import Transports
from prefill_worker.config import PrefillConfig

VOCAB_SIZE = 32_000

_ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class WatchedStep:
    """One engine step, by CLOCK_MONOTONIC."""

    begun_at_s: float
    ended_at_s: float


class WatchedEngine:
    """Implements engine.types.Engine by another one, and notes when its steps began and ended."""

    def __init__(self, inner: TimedEngine) -> None:
        self._inner = inner
        self.steps: list[WatchedStep] = []

    @property
    def info(self) -> EngineInfo:
        return self._inner.info

    @property
    def arena(self) -> Arena:
        return self._inner.arena

    def step(self, batch: Sequence[SeqStep]) -> list[Sampled | BatonError | None]:
        begun_at_s = time.monotonic()
        results = self._inner.step(batch)
        self.steps.append(WatchedStep(begun_at_s, time.monotonic()))
        return results

    def close(self) -> None:
        self._inner.close()


@dataclass(frozen=True, slots=True)
class Said:
    """A message of the worker to its router, and when it was heard; tokens one entry each."""

    message: Accepted | LegTokens
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRig:
    """One running worker and its only router."""

    worker: Worker
    engine: WatchedEngine
    watched: WatchedTransport
    address: str
    incarnation: Incarnation
    outlet: RouterOutlet
    said: "asyncio.Queue[WorkerToRouter]"
    """All that came out of the outlet."""
    loop: "asyncio.Task[None]"
    """Ends only by failure, and the worker with it."""

    def submit(self, message: RouterToWorker) -> None:
        self.worker.handle(self.outlet, message)

    async def hear(self) -> Said:
        """The next acceptance or token. Raises BenchFailed when the leg fails or says nothing."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await self._hear()
        except TimeoutError:
            if self.loop.done():
                self.loop.result()
            raise BenchFailed(f"a worker said nothing for {_ANSWER_TIMEOUT_S:g} s") from None

    async def _hear(self) -> Said:
        while True:
            message = await self.said.get()
            match message:
                case Accepted():
                    return Said(message, time.monotonic())
                case TokenFrame(entries=(entry,)):
                    return Said(entry, time.monotonic())
                case Rejected() | LegFailed():
                    raise BenchFailed(f"a worker refused or failed a leg: {message.message}")
                case _:
                    continue


@asynccontextmanager
async def worker_rig(role: Role, engine: EngineConfig) -> AsyncIterator[WorkerRig]:
    """Run a worker with a timed engine inside; its transport is nixl."""
    watched_engine = WatchedEngine(TimedEngine(engine, vocab_size=VOCAB_SIZE))
    incarnation = new_incarnation()
    seals = Seals()
    way = make_transport("nixl", watched_engine.arena, incarnation, seals)
    watched = WatchedTransport(way)
    address = address_of(peers := listen(HOST, 0))
    worker = Worker(
        engine=watched_engine,
        transports=Transports([watched], seals),
        identity=WorkerIdentity(
            worker_id=WorkerId(role),
            incarnation=incarnation,
            address="",
            peer_address=address,
        ),
        role=role,
        settings=WorkerSettings(
            engine=engine,
            transfer=TransferConfig(),
            prefill=PrefillConfig(),
            decode=DecodeConfig(),
        ),
        clock=SystemClock(),
    )
    async with (
        worker.running() as loop,
        serving_peers(peers, worker.owner, worker.peer_hello, worker.arena),
    ):
        said: asyncio.Queue[WorkerToRouter] = asyncio.Queue()
        yield WorkerRig(
            worker=worker,
            engine=watched_engine,
            watched=watched,
            address=address,
            incarnation=incarnation,
            outlet=worker.attach(said.put_nowait),
            said=said,
            loop=loop,
        )
