"""Ends of a transfer for the transport tests: in this process, and as owners of their own."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from core.ids import ShardId, new_incarnation, shard_id
from core.kv import KvLayout
from engine.arena import Arena
from kv_transfer.collective import CollectiveTransport
from kv_transfer.loopback import LoopbackHub, LoopbackTransport
from kv_transfer.messages import Memory, Seal
from kv_transfer.nixl import NixlTransport
from kv_transfer.plan import ReadPlan
from kv_transfer.seals import Seals
from kv_transfer.transport import ReadStats, Sealed, Transport

LAYOUT = KvLayout(block_size=16, num_kv_heads=2, num_layers=4, head_dim=16, dtype="uint8")
BLOCK_BYTES = LAYOUT.block_bytes
WAIT_S = 10.0
START_TIMEOUT_S = 50.0

Row = tuple[int, int, int]


def make_plan(rows: Sequence[Row]) -> ReadPlan:
    """Rows of owner's offset, reader's offset, bytes."""
    return ReadPlan(np.array(rows, dtype=np.uint64).reshape(-1, 3))


def make_transport(
    kind: str,
    arena: Arena,
    hub: LoopbackHub,
    *,
    seals: Seals | None = None,
    read_timeout_s: float = 10.0,
    connect_timeout_s: float = 3.0,
) -> Transport:
    match kind:
        case "nixl":
            return NixlTransport(
                arena, new_incarnation(), read_timeout_s=read_timeout_s, seals=seals
            )
        case "collective":
            return CollectiveTransport(
                arena, read_timeout_s=read_timeout_s, connect_timeout_s=connect_timeout_s
            )
        case _:
            return LoopbackTransport(arena, hub, seals)


@dataclass
class Side:
    """One transport and its arena, filled with noise."""

    shard: ShardId
    arena: Arena
    transport: Transport
    seals: Seals

    @property
    def data(self) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        """All bytes of the arena, not a copy."""
        return self.arena.data.view(-1).view(torch.uint8).numpy()

    async def connect(self, owner: "Side") -> None:
        async with asyncio.timeout(WAIT_S):
            await self.transport.connect(owner.shard, owner.transport.memory())

    def start(
        self, owner: "Side", rows: Sequence[Row], sealed: Sealed | None = None
    ) -> "asyncio.Future[ReadStats]":
        return self.transport.start_read(owner.shard, make_plan(rows), sealed)

    async def read(
        self, owner: "Side", rows: Sequence[Row], sealed: Sealed | None = None
    ) -> ReadStats:
        async with asyncio.timeout(WAIT_S):
            return await self.start(owner, rows, sealed)


def noise(arena: Arena, seed: int) -> None:
    """Bytes that another process can make again."""
    arena.data.random_(0, 256, generator=torch.Generator().manual_seed(seed))


@asynccontextmanager
async def side(
    kind: str,
    hub: LoopbackHub,
    *,
    num_blocks: int = 256,
    seed: int = 0,
    read_timeout_s: float = 10.0,
    connect_timeout_s: float = 3.0,
) -> AsyncIterator[Side]:
    """Closed on the way out, if it was not before."""
    arena = Arena(LAYOUT, num_blocks)
    noise(arena, seed)
    seals = Seals()
    transport = make_transport(
        kind,
        arena,
        hub,
        seals=seals,
        read_timeout_s=read_timeout_s,
        connect_timeout_s=connect_timeout_s,
    )
    try:
        yield Side(shard_id(new_incarnation(), 0), arena, transport, seals)
    finally:
        await transport.close()


@dataclass
class OwnerProcess:
    """An arena in another process, filled with `noise`."""

    process: "subprocess.Popen[str]"
    memory: Memory
    shard: ShardId
    seal: Seal
    """One that is whole."""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        """It hangs from now on."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@asynccontextmanager
async def owner_processes(
    kind: str, num_blocks: int, seeds: Sequence[int]
) -> AsyncIterator[list[OwnerProcess]]:
    """One for each seed, with the noise that `side` has for it; killed on the way out."""
    started = [_start_owner(kind, num_blocks, seed) for seed in seeds]
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            owners = [await _wait_ready(process) for process in started]
        yield owners
    finally:
        for process in started:
            process.kill()
            process.communicate(timeout=10)


async def _wait_ready(process: "subprocess.Popen[str]") -> OwnerProcess:
    assert process.stdout is not None
    fields = json.loads(await asyncio.to_thread(process.stdout.readline))
    seal = Seal(**fields.pop("seal"))
    memory = Memory(**{**fields, "metadata": bytes.fromhex(fields["metadata"])})
    return OwnerProcess(process, memory, shard_id(new_incarnation(), 0), seal)


def _start_owner(kind: str, num_blocks: int, seed: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", __name__, kind, str(num_blocks), str(seed)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


async def _serve(kind: str, num_blocks: int, seed: int) -> None:
    async with side(kind, LoopbackHub(), num_blocks=num_blocks, seed=seed) as owner:
        memory = owner.transport.memory()
        fields = asdict(replace(memory, metadata=b"")) | {"metadata": memory.metadata.hex()}
        seal = owner.seals.set_one()
        assert seal is not None
        fields["seal"] = asdict(seal)
        print(json.dumps(fields), flush=True)
        await asyncio.to_thread(sys.stdin.read)  # until the test ends


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
