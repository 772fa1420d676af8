"""The transport between workers of one process: a copy. For tests and simulation."""

import asyncio
import time
from dataclasses import replace

import torch

from core.errors import TransferCause, TransferFailed
from core.ids import ShardId
from engine.arena import Arena
from kv_transfer.messages import Memory
from kv_transfer.plan import ReadPlan
from kv_transfer.seals import Seals
from kv_transfer.transport import ReadStats, Sealed


class LoopbackHub:
    """The arenas of this process and their owners' seals, by the arena's address; shared by all
    its loopback transports.
    """

    def __init__(self) -> None:
        self.arenas: dict[int, torch.Tensor] = {}
        self.seals: dict[int, Seals] = {}


class LoopbackTransport:
    """Implements kv_transfer.transport.Transport. A read has ended when `start_read` returns."""

    name = "loopback"

    def __init__(self, arena: Arena, hub: LoopbackHub, seals: Seals | None = None) -> None:
        self._arena = arena
        self._hub = hub
        self._bytes = _as_bytes(arena)
        self._hub.arenas[arena.address] = self._bytes
        if seals is not None:
            self._hub.seals[arena.address] = seals
        self._peers: dict[ShardId, int] = {}

    def memory(self) -> Memory:
        return Memory(
            transport=self.name,
            metadata=b"",
            address=self._arena.address,
            nbytes=self._arena.nbytes,
            device=str(self._arena.data.device),
        )

    async def connect(self, peer: ShardId, memory: Memory) -> None:
        if memory.transport != self.name:
            raise TransferFailed(
                f"the peer moves KV by {memory.transport}, this worker by loopback",
                cause=TransferCause.NO_TRANSPORT,
            )
        if memory.address not in self._hub.arenas:
            raise TransferFailed(
                "the peer is not in this process: loopback cannot reach it",
                cause=TransferCause.NO_ANSWER,
            )
        self._peers[peer] = memory.address

    def start_read(
        self, peer: ShardId, plan: ReadPlan, sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        future: asyncio.Future[ReadStats] = asyncio.get_running_loop().create_future()
        try:
            copied = self._copy(peer, plan)
            future.set_result(replace(copied, sealed=self._is_whole(peer, sealed)))
        except TransferFailed as failure:
            future.set_exception(failure)
        return future

    async def disconnect(self, peer: ShardId) -> None:
        self._peers.pop(peer, None)

    async def failed(self) -> Exception:
        never: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        return await never

    async def close(self) -> None:
        self._hub.arenas.pop(self._arena.address, None)
        self._hub.seals.pop(self._arena.address, None)
        self._peers.clear()

    def _is_whole(self, peer: ShardId, sealed: Sealed | None) -> bool:
        seals = self._hub.seals.get(self._peers[peer])
        return sealed is not None and seals is not None and seals.is_whole(sealed.seal)

    def _copy(self, peer: ShardId, plan: ReadPlan) -> ReadStats:
        if peer not in self._peers:
            raise TransferFailed(f"not connected to {peer}", cause=TransferCause.READ_FAILED)
        source = self._hub.arenas.get(self._peers[peer])
        if source is None:
            raise TransferFailed("the peer's memory is gone", cause=TransferCause.READ_FAILED)
        rows: list[list[int]] = plan.rows.tolist()
        if any(remote + nbytes > len(source) for remote, _, nbytes in rows):
            raise TransferFailed(
                "the plan reads past the peer's arena", cause=TransferCause.READ_FAILED
            )
        if any(local + nbytes > len(self._bytes) for _, local, nbytes in rows):
            raise TransferFailed(
                "the plan writes past this worker's arena", cause=TransferCause.READ_FAILED
            )
        started_s = time.perf_counter()
        for remote, local, nbytes in rows:
            self._bytes[local : local + nbytes] = source[remote : remote + nbytes]
        return ReadStats(
            nbytes=plan.nbytes,
            descriptors=plan.descriptors,
            seconds=time.perf_counter() - started_s,
        )


def _as_bytes(arena: Arena) -> torch.Tensor:
    return arena.data.view(-1).view(torch.uint8)
