"""A real worker with a fault: `python -m tests.faulty_worker FAULT ...`.

FAULT is `zero` (the first block its transport reads arrives as zeros), `swap` (first and last
change places), or `halting` (after SIGUSR1 its engine does not end a step until SIGUSR2).
"""

import asyncio
import signal
import sys
import threading
from collections.abc import Sequence

import torch

from cluster.worker.__main__ import main
from core.errors import BatonError
from core.ids import Incarnation, ShardId
from engine.arena import Arena
from engine.timed import TimedEngine
from engine.types import Sampled, SeqStep
from kv_transfer.config import TransferConfig
from kv_transfer.messages import Memory
from kv_transfer.nixl import NixlTransport
from kv_transfer.plan import ReadPlan
from kv_transfer.seals import Seals
from kv_transfer.transport import ReadStats, Sealed, Transport
from kv_transfer.transports import Transports


class DamagingTransport:
    """Wraps a transport; after each read, and before its future ends, damages the target."""

    def __init__(self, inner: Transport, arena: Arena, fault: str) -> None:
        self._inner = inner
        self._memory = arena.data.view(-1).view(torch.uint8)
        self._block_bytes = arena.layout.block_bytes
        self._fault = fault
        self.name = inner.name

    def memory(self) -> Memory:
        return self._inner.memory()

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        await self._inner.connect(peer, memory)

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        read = self._inner.start_read(peer, plan, sealed)
        read.add_done_callback(lambda _: self._damage(plan))
        return read

    async def disconnect(self, peer: ShardId) -> None:
        await self._inner.disconnect(peer)

    async def failed(self) -> Exception:
        return await self._inner.failed()

    async def close(self) -> None:
        await self._inner.close()

    def _damage(self, plan: ReadPlan) -> None:
        offsets = [
            target + i
            for _, target, nbytes in plan.rows.tolist()
            for i in range(0, nbytes, self._block_bytes)
        ]
        blocks = [self._memory[at : at + self._block_bytes] for at in offsets]
        if self._fault == "zero":
            blocks[0].zero_()
        elif len(blocks) > 1:
            # Not two full blocks: keys carry their position, so attention over all of them is the
            # same in any order. The last block is partly masked.
            first = blocks[0].clone()
            blocks[0].copy_(blocks[-1])
            blocks[-1].copy_(first)


def damaging(
    config: TransferConfig, arena: Arena, incarnation: Incarnation, _host: str
) -> Transports:
    seals = Seals()
    nixl = NixlTransport(arena, incarnation, config.read_timeout_s, seals)
    return Transports([DamagingTransport(nixl, arena, FAULT)], seals)


def halt_on_signal() -> None:
    """The engine's thread waits; the event loop goes on."""
    going, step = threading.Event(), TimedEngine.step
    going.set()

    def halting(engine: TimedEngine, batch: Sequence[SeqStep]) -> list[Sampled | BatonError | None]:
        going.wait(60)
        return step(engine, batch)

    TimedEngine.step = halting  # type: ignore[method-assign]
    signal.signal(signal.SIGUSR1, lambda *_: going.clear())
    signal.signal(signal.SIGUSR2, lambda *_: going.set())


if __name__ == "__main__":
    FAULT = sys.argv.pop(1)
    if FAULT == "halting":
        halt_on_signal()
        sys.exit(main())
    sys.exit(main(damaging))
