"""Plans executed for real: a NIXL agent per rank, workers of different size and order of axes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest

from core.ids import BlockId, Incarnation, new_incarnation, shard_id
from core.kv import BLOCK_FIRST, LAYER_FIRST, Axis, KvLayout
from engine.arena import Arena
from kv_transfer.nixl import NixlTransport
from kv_transfer.plan import ArenaShape, ReadPlan, plan_read
from kv_transfer.transport import ReadStats
from tests.builders import soon
from tests.kv_transfer.shards import Model, Numbers, fill, ids, wanted

NUM_BLOCKS = 10
MEMORY_BYTES = 1 << 16
SIZES = (1, 2, 4, 8)
PAIRS = list(product(SIZES, SIZES))
REMOTE, LOCAL = ids([3, 4, 9, 0]), ids([7, 8, 2, 5])
HEADS_OUTSIDE: tuple[Axis, ...] = ("layer", "side", "block", "head", "token")
LATENT = Model(heads=1, sides=1, head_dim=12)


class Rank:
    """One agent with memory for any arena of these tests."""

    def __init__(self, incarnation: Incarnation, rank: int) -> None:
        raw = KvLayout(
            block_size=1, num_kv_heads=1, num_layers=1, head_dim=MEMORY_BYTES // 2, dtype="uint8"
        )
        arena = Arena(raw, 1)
        self.shard_id = shard_id(incarnation, rank)
        self.transport = NixlTransport(arena, Incarnation(self.shard_id))
        self.memory: Numbers = arena.data.numpy().reshape(-1)

    def arena(self, shape: ArenaShape) -> Numbers:
        """The first bytes as the arena of `shape`, a float's four bytes an element."""
        nbytes = shape.num_blocks * shape.layout.block_bytes
        elements: Numbers = self.memory[:nbytes].view(np.uint32)
        return elements

    async def read(self, owner: "Rank", plan: ReadPlan) -> int:
        """Answers the number of descriptors."""
        await soon(self.transport.connect(owner.shard_id, owner.transport.memory()))
        stats = await soon(self.transport.start_read(owner.shard_id, plan))
        assert isinstance(stats, ReadStats)
        assert (stats.nbytes, stats.descriptors) == (plan.nbytes, plan.descriptors)
        return stats.descriptors


@dataclass(frozen=True, slots=True)
class Workers:
    """Eight ranks on either side; a test uses as many as it wants."""

    owners: list[Rank]
    readers: list[Rank]


@pytest.fixture(scope="module")
async def workers() -> AsyncIterator[Workers]:
    async with AsyncExitStack() as stack:
        sides: list[list[Rank]] = []
        for _ in range(2):
            incarnation = new_incarnation()
            ranks = [Rank(incarnation, rank) for rank in range(max(SIZES))]
            for rank in ranks:
                stack.push_async_callback(rank.transport.close)
            sides.append(ranks)
        yield Workers(*sides)


async def read_all(
    workers: Workers,
    model: Model,
    theirs: tuple[tuple[Axis, ...], int],
    ours: tuple[tuple[Axis, ...], int],
    blocks: tuple[Sequence[BlockId], Sequence[BlockId]] = (REMOTE, LOCAL),
) -> list[dict[int, int]]:
    """Every rank of the reader reads; answers its descriptors by owner rank. What each arena holds
    afterwards must be right to the last byte."""
    remote, local = blocks
    owners, readers = model.worker(*theirs, NUM_BLOCKS), model.worker(*ours, NUM_BLOCKS)
    truth = model.truth(NUM_BLOCKS, model.head_dim)
    for shape, rank in zip(owners, workers.owners, strict=False):
        rank.memory[:] = 0
        fill(shape, rank.arena(shape), truth)
    read = []
    for shape, rank in zip(readers, workers.readers, strict=False):
        rank.memory[:] = 255
        before = rank.arena(shape).copy()
        plans = plan_read(owners, shape, remote, local)
        read.append({i: await rank.read(workers.owners[i], plan) for i, plan in plans.items()})
        after = rank.arena(shape)
        assert np.array_equal(after, wanted(shape, before, truth, remote, local))
        assert (rank.memory[after.nbytes :] == 255).all()
    return read


@pytest.mark.parametrize(("owner_tp", "reader_tp"), PAIRS)
async def test_each_size_reads_from_each(workers: Workers, owner_tp: int, reader_tp: int) -> None:
    read = await read_all(workers, Model(), (BLOCK_FIRST, owner_tp), (BLOCK_FIRST, reader_tp))
    per_read = 3 if owner_tp == reader_tp else 4  # two of the four blocks are neighbours
    assert all(set(counts.values()) == {per_read} for counts in read)
    assert sum(map(len, read)) == max(owner_tp, reader_tp)


@pytest.mark.parametrize(("owner_tp", "reader_tp"), PAIRS)
async def test_few_heads_are_read_from_their_replicas(
    workers: Workers, owner_tp: int, reader_tp: int
) -> None:
    two = Model(heads=2)
    read = await read_all(workers, two, (BLOCK_FIRST, owner_tp), (BLOCK_FIRST, reader_tp))
    used = {rank for counts in read for rank in counts}
    assert len(used) == min(owner_tp, max(2, reader_tp))


@pytest.mark.parametrize(("owner_tp", "reader_tp"), PAIRS)
async def test_a_latent_vector_is_read_once_per_rank(
    workers: Workers, owner_tp: int, reader_tp: int
) -> None:
    read = await read_all(workers, LATENT, (BLOCK_FIRST, owner_tp), (BLOCK_FIRST, reader_tp))
    assert all(list(counts.values()) == [3] for counts in read)


@pytest.mark.parametrize("theirs", [LAYER_FIRST, HEADS_OUTSIDE])
@pytest.mark.parametrize(("owner_tp", "reader_tp"), [(1, 1), (2, 4), (8, 2), (4, 4)])
async def test_a_block_first_worker_reads_from_a_layer_first_one(
    workers: Workers, theirs: tuple[Axis, ...], owner_tp: int, reader_tp: int
) -> None:
    await read_all(workers, Model(), (theirs, owner_tp), (BLOCK_FIRST, reader_tp))
    await read_all(workers, Model(), (BLOCK_FIRST, owner_tp), (theirs, reader_tp))


@pytest.mark.parametrize(("owner_tp", "reader_tp"), [(1, 1), (1, 8), (8, 1), (2, 4)])
async def test_layer_first_workers_read_from_each_other(
    workers: Workers, owner_tp: int, reader_tp: int
) -> None:
    await read_all(workers, Model(), (LAYER_FIRST, owner_tp), (LAYER_FIRST, reader_tp))


async def test_a_latent_vector_crosses_from_layer_first(workers: Workers) -> None:
    read = await read_all(workers, LATENT, (LAYER_FIRST, 4), (BLOCK_FIRST, 2))
    assert read == [{0: LATENT.layers * 4}, {2: LATENT.layers * 4}]


async def test_a_whole_arena_is_one_descriptor(workers: Workers) -> None:
    everything = ids(range(NUM_BLOCKS))
    for axes in (BLOCK_FIRST, LAYER_FIRST):
        side = (axes, 2)
        read = await read_all(workers, Model(), side, side, (everything, everything))
        assert read == [{0: 1}, {1: 1}]


async def test_all_shards_may_be_read_at_once(workers: Workers) -> None:
    model, rank = Model(), workers.readers[0]
    owners, shape = model.worker(BLOCK_FIRST, 4, NUM_BLOCKS), model.worker(BLOCK_FIRST, 1, 10)[0]
    truth = model.truth(NUM_BLOCKS, model.head_dim)
    rank.memory[:] = 255
    before = rank.arena(shape).copy()
    for owner_shape, owner in zip(owners, workers.owners, strict=False):
        fill(owner_shape, owner.arena(owner_shape), truth)
    plans = plan_read(owners, shape, REMOTE, LOCAL)
    async with asyncio.TaskGroup() as group:
        for index, plan in plans.items():
            group.create_task(rank.read(workers.owners[index], plan))
    assert len(plans) == 4
    assert np.array_equal(rank.arena(shape), wanted(shape, before, truth, REMOTE, LOCAL))
