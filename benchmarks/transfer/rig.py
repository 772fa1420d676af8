"""The two ends of a hand-off as a worker wires them, without engine and roles.

Everything between a handle and usable blocks is the real thing: leases, PeerStream,
transport, pool, closing question.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import torch

from benchmarks.transfer.watch import WatchedTransport
from core.clock import SystemClock
from core.ids import (
    BlockId,
    Incarnation,
    LeaseId,
    ModelId,
    RequestId,
    SequenceId,
    WorkerId,
    new_incarnation,
)
from core.kv import KvLayout
from core.messages import Handoff
from core.stream import address_of, listen
from engine.arena import Arena
from engine.pool import BlockPool
from kv_transfer.config import TransferConfig
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.messages import Memory, PeerHello, Shard
from kv_transfer.owner import Owner
from kv_transfer.reader import Pulled, PullRequest, Reader
from kv_transfer.seals import Seals
from kv_transfer.server import serving_peers
from kv_transfer.transport import Transport
from kv_transfer.transports import Transports

HOST = "127.0.0.1"
MODEL_ID = ModelId("bench")
PULL_TIMEOUT_S = 60.0
FIRST_TOKEN = 1
_OWNER_SEED, _READER_SEED = 1, 2

LLAMA_8B = KvLayout(
    block_size=16, num_kv_heads=8, num_layers=32, head_dim=128, dtype="bfloat16", total_kv_heads=8
)
"""128 KiB per token, 2 MiB per block of 16: Llama-3-8B and its kin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaTask:
    """What both sides of a measurement build. `backend` is a transfer.backend."""

    layout: KvLayout
    num_blocks: int
    device: str
    backend: str = "nixl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Owner to reader, once: where it is, and how its arena is read without all this."""

    address: str
    incarnation: Incarnation
    memories: tuple[Memory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerRig:
    """An owner that serves PeerStream. Its blocks are filled, see `stamp_of`."""

    arena: Arena
    pool: BlockPool
    owner: Owner
    door: Door

    def open(self, number: int) -> Lease:
        """A lease of hand-off `number`."""
        return self.owner.open(sequence_id(number))

    def finish(self, lease: Lease, blocks: Sequence[BlockId]) -> None:
        """Announce the last blocks and a first token."""
        self.owner.finish(lease, blocks, (FIRST_TOKEN,), ended=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderRig:
    """A reader with its own pool and arena. `watched` remembers what it posted."""

    arena: Arena
    pool: BlockPool
    reader: Reader
    watched: WatchedTransport

    async def pull(self, door: Door, lease_id: LeaseId, number: int, blocks: int) -> Pulled:
        """Hand-off `number`: from its handle to usable blocks."""
        size = self.arena.layout.block_size
        return await self.reader.pull(
            PullRequest(
                handoff=Handoff(
                    owner_id=WorkerId("owner"),
                    owner_address=door.address,
                    owner_incarnation=door.incarnation,
                    lease_id=lease_id,
                ),
                sequence_id=sequence_id(number),
                hashes=(),
                context_tokens=blocks * size,
                timeout_s=PULL_TIMEOUT_S,
            )
        )


def sequence_id(number: int) -> SequenceId:
    return SequenceId(RequestId(f"bench-{number}"))


@asynccontextmanager
async def owner_rig(task: ArenaTask) -> AsyncIterator[OwnerRig]:
    """Serve inside; the arena's content is that of `fill`."""
    arena, pool = make_arena(task), scattered_pool(task.num_blocks, _OWNER_SEED)
    fill(arena)
    incarnation = new_incarnation()
    seals = Seals()
    transports = Transports([make_transport(task.backend, arena, incarnation, seals)], seals)
    leases = LeaseTable(pool, SystemClock(), TransferConfig().lease_s, seals)
    owner = Owner(leases, lambda: None)
    door = Door(
        address=address_of(peers := listen(HOST, 0)),
        incarnation=incarnation,
        memories=transports.memories(),
    )
    try:
        async with serving_peers(
            peers, owner, lambda: _hello("owner", incarnation, arena, transports), arena
        ):
            yield OwnerRig(arena=arena, pool=pool, owner=owner, door=door)
    finally:
        await transports.close()


@asynccontextmanager
async def reader_rig(task: ArenaTask) -> AsyncIterator[ReaderRig]:
    """Pull inside."""
    arena, pool = make_arena(task), scattered_pool(task.num_blocks, _READER_SEED)
    incarnation = new_incarnation()
    watched = WatchedTransport(make_transport(task.backend, arena, incarnation))
    transports = Transports([watched])
    reader = Reader(
        pool=pool,
        arena=arena,
        transports=transports,
        hello=lambda: _hello("reader", incarnation, arena, transports),
        config=TransferConfig(),
        headroom=lambda: 0,
    )
    try:
        async with reader:
            yield ReaderRig(arena=arena, pool=pool, reader=reader, watched=watched)
    finally:
        await transports.close()


def _hello(name: str, incarnation: Incarnation, arena: Arena, ways: Transports) -> PeerHello:
    return PeerHello(
        worker_id=WorkerId(name),
        incarnation=incarnation,
        model_id=MODEL_ID,
        shards=(Shard(layout=arena.layout, memories=ways.memories()),),
    )


def make_transport(
    backend: str, arena: Arena, incarnation: Incarnation, seals: Seals | None = None
) -> Transport:
    """One way to move blocks. Needs a running event loop."""
    if backend == "collective":
        from kv_transfer.collective import CollectiveTransport  # noqa: PLC0415

        return CollectiveTransport(arena, HOST)
    from kv_transfer.nixl import NixlTransport  # noqa: PLC0415 - loads UCX, which reads UCX_TLS

    return NixlTransport(arena, incarnation, seals=seals)


def make_arena(task: ArenaTask) -> Arena:
    return Arena(task.layout, task.num_blocks, task.device)


def scattered_pool(num_blocks: int, seed: int) -> BlockPool:
    """A pool whose free blocks come in no order, as after hours of serving: nothing coalesces."""
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(num_blocks) or []
    Random(seed).shuffle(blocks)
    pool.release(blocks)
    return pool


# -- content ------------------------------------------------------------------------------------


def fill(arena: Arena) -> None:
    """Every block gets bytes of its own, and no page stays unmapped."""
    for i, block in enumerate(block_bytes(arena)):
        block.fill_(stamp_of(i))


def stamp_of(block: int) -> int:
    """The byte an owner's block is full of: 1 to 251."""
    return block % 251 + 1


def block_bytes(arena: Arena) -> torch.Tensor:
    """`[num_blocks, block_bytes]` uint8, a view."""
    return arena.data.view(-1).view(torch.uint8).view(arena.num_blocks, -1)


def first_wrong(arena: Arena, remote: Sequence[BlockId], local: Sequence[BlockId]) -> int | None:
    """Place of the first block whose first or last byte is not its owner's."""
    blocks = block_bytes(arena)
    for i, (theirs, ours) in enumerate(zip(remote, local, strict=True)):
        stamp = stamp_of(theirs)
        if int(blocks[ours, 0]) != stamp or int(blocks[ours, -1]) != stamp:
            return i
    return None
