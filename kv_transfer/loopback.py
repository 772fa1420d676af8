"""The transport between workers of one process: a copy. For tests and simulation."""

import asyncio
import time
from collections.abc import Sequence

import torch

from core.errors import TransferFailed
from core.ids import Incarnation
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.plan import Descriptor
from kv_transfer.transport import ReadStats, TransportCounters


class LoopbackHub:
    """The arenas of this process, by address; shared by all its loopback transports."""

    def __init__(self) -> None:
        self.arenas: dict[int, torch.Tensor] = {}


class LoopbackTransport:
    """Implements kv_transfer.transport.Transport."""

    name = "loopback"

    def __init__(self, arena: Arena, hub: LoopbackHub) -> None:
        self._arena = arena
        self._hub = hub
        self._bytes = _as_bytes(arena)
        self._hub.arenas[arena.address] = self._bytes
        self._peers: dict[Incarnation, int] = {}
        self._counters = TransportCounters()

    @property
    def counters(self) -> TransportCounters:
        return self._counters

    def memory(self) -> Memory:
        return Memory(
            transport=self.name,
            metadata=b"",
            address=self._arena.address,
            nbytes=self._arena.nbytes,
            device=str(self._arena.data.device),
        )

    async def connect(self, peer: Incarnation, memory: Memory) -> None:
        if memory.transport != self.name or memory.address not in self._hub.arenas:
            raise TransferFailed("the peer is not in this process: loopback cannot reach it")
        self._peers[peer] = memory.address

    def start_read(
        self, peer: Incarnation, plan: Sequence[Descriptor]
    ) -> "asyncio.Future[ReadStats]":
        future: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        source = self._hub.arenas.get(self._peers.get(peer, -1))
        if source is None:
            self._counters.failures += 1
            future.set_exception(TransferFailed("the peer's memory is gone"))
            return future
        started_s = time.perf_counter()
        for part in plan:
            remote = source[part.remote_offset_bytes : part.remote_offset_bytes + part.nbytes]
            self._bytes[part.local_offset_bytes : part.local_offset_bytes + part.nbytes] = remote
        stats = ReadStats(
            nbytes=sum(part.nbytes for part in plan),
            descriptors=len(plan),
            seconds=time.perf_counter() - started_s,
        )
        self._counters.add(stats)
        future.set_result(stats)
        return future

    async def disconnect(self, peer: Incarnation) -> None:
        self._peers.pop(peer, None)

    async def failed(self) -> Exception:
        never: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        return await never

    async def close(self) -> None:
        self._hub.arenas.pop(self._arena.address, None)


def _as_bytes(arena: Arena) -> torch.Tensor:
    return arena.data.view(-1).view(torch.uint8)
