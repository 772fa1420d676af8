"""A real worker whose transport damages what it read: `python -m tests.faulty_worker FAULT ...`.

FAULT is `zero` (the first block read arrives as zeros) or `swap` (first and last change places).
"""

import asyncio
import sys
from collections.abc import Sequence

import torch

from cluster.worker.__main__ import main
from cluster.worker.host import make_transport
from core.ids import Incarnation
from engine.types import Engine
from kv_transfer.config import TransferConfig
from kv_transfer.messages import Memory
from kv_transfer.plan import Descriptor
from kv_transfer.transport import ReadStats, Transport, TransportCounters


class DamagingTransport:
    """Wraps a transport; after each read, and before its future ends, damages the target."""

    def __init__(self, inner: Transport, memory: torch.Tensor, block_bytes: int, fault: str):
        self._inner = inner
        self._memory = memory
        self._block_bytes = block_bytes
        self._fault = fault
        self.name = inner.name

    @property
    def counters(self) -> TransportCounters:
        return self._inner.counters

    def memory(self) -> Memory:
        return self._inner.memory()

    async def connect(self, peer: Incarnation, memory: Memory) -> None:
        await self._inner.connect(peer, memory)

    def start_read(
        self, peer: Incarnation, plan: Sequence[Descriptor]
    ) -> "asyncio.Future[ReadStats]":
        read = self._inner.start_read(peer, plan)
        read.add_done_callback(lambda _: self._damage(plan))
        return read

    async def disconnect(self, peer: Incarnation) -> None:
        await self._inner.disconnect(peer)

    async def failed(self) -> Exception:
        return await self._inner.failed()

    async def close(self) -> None:
        await self._inner.close()

    def _damage(self, plan: Sequence[Descriptor]) -> None:
        offsets = [
            part.local_offset_bytes + i
            for part in plan
            for i in range(0, part.nbytes, self._block_bytes)
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


def damaging(config: TransferConfig, engine: Engine, incarnation: Incarnation) -> Transport:
    memory = engine.arena.data.view(-1).view(torch.uint8)
    inner = make_transport(config, engine, incarnation)
    return DamagingTransport(inner, memory, engine.info.layout.block_bytes, FAULT)


if __name__ == "__main__":
    FAULT = sys.argv.pop(1)
    sys.exit(main(damaging))
