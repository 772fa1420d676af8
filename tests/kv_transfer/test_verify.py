"""Checksums: what differs from the owner's is never used."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from core.errors import TransferCause, TransferFailed
from core.ids import BlockId, ShardId
from core.kv import BLOCK_FIRST, LAYER_FIRST, Axis, KvLayout
from engine.arena import Arena
from kv_transfer import checksum, server
from kv_transfer.checksum import VerifyMode, checksum_blocks, pick_blocks
from kv_transfer.client import PeerConnection
from kv_transfer.messages import Close, Closed, FromOwner, Renew
from kv_transfer.metrics import LeaseEnd
from kv_transfer.plan import ReadPlan
from kv_transfer.transport import ReadStats, Sealed
from tests.builders import until
from tests.kv_transfer.halves import LAST, LAYOUT, Pair, failure, pair


def flip_a_byte_of(p: Pair, index: int) -> None:
    """Damage block `index` of the next pull between its read and the closing question."""
    start_read = p.half.transport.start_read

    def damaged(peer, plan, sealed):  # type: ignore[no-untyped-def]
        read = start_read(peer, plan, sealed)
        block_bytes = p.half.arena.layout.block_bytes
        data = p.half.arena.data.view(-1)
        targets = [
            local + at for _, local, n in plan.rows.tolist() for at in range(0, n, block_bytes)
        ]
        data[targets[index] + 5] ^= 1
        return read

    p.half.transport.start_read = damaged  # type: ignore[method-assign]


async def test_with_verify_all_a_flipped_byte_is_found() -> None:
    async with pair(verify="all") as p:
        lease, _ = p.owner.whole(4)
        flip_a_byte_of(p, 2)
        with pytest.raises(TransferFailed) as caught:
            await p.pull(lease, 4)
        assert caught.value.cause is TransferCause.CHECKSUM
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_without_verify_it_is_not() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(4)
        flip_a_byte_of(p, 2)
        p.half.pool.release((await p.pull(lease, 4)).blocks)


@pytest.mark.parametrize("mode", ["sample", "all"])
async def test_blocks_that_arrived_well_pass(mode: VerifyMode) -> None:
    async with pair(verify=mode) as p:
        lease, blocks = p.owner.whole(5)
        p.assert_arrived(await p.pull(lease, 5, cached=2), blocks[2:])
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1


async def test_a_lost_answer_with_checksums_is_no_confirmation_and_no_damage() -> None:
    """The question that follows it finds the lease closed, and its blocks perhaps others'."""
    async with pair(verify="all", read_timeout_s=0.6) as p:
        lost: list[FromOwner] = []

        def says(message: FromOwner) -> list[FromOwner]:
            first = isinstance(message, Closed) and not lost
            if first:
                lost.append(message)
            return [] if first else [message]

        p.owner.owner.says = says
        lease, _ = p.owner.whole(4)
        with pytest.raises(TransferFailed) as caught:
            await p.pull(lease, 4)
        assert caught.value.cause is TransferCause.NOT_CONFIRMED
        assert [isinstance(m, Closed) and len(m.checksums) for m in lost] == [
            4 * LAYOUT.num_kv_heads
        ]
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


@dataclass
class SlowSums:
    """The owner's checksums take until `go_on`."""

    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    begun: list[tuple[BlockId, ...]] = field(default_factory=list)
    cancelled: int = 0

    async def sum(self, arena: Arena, block_ids: Sequence[BlockId]) -> tuple[int, ...]:
        self.begun.append(tuple(block_ids))
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await checksum_blocks(arena, block_ids)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> SlowSums:
    slow = SlowSums()
    monkeypatch.setattr(server, "checksum_blocks", slow.sum)
    return slow


async def test_while_an_owner_sums_it_hears_renewals_and_serves_other_leases(
    slow: SlowSums,
) -> None:
    """For longer than the third of a lease after which silence is a lost owner."""
    async with pair(verify="all", lease_s=0.3) as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.whole(4)
        other, coming = p.owner.open(2)
        pulling = group.create_task(p.pull(lease, 4))
        waiting = group.create_task(p.pull(other, 2))
        await until(lambda: bool(slow.begun), "the owner sums")
        p.owner.owner.heard.clear()
        await until(lambda: renewals(p) == 4, "a lease's time is over")
        p.owner.owner.finish(other, coming, LAST, ended=False)
        await until(lambda: len(slow.begun) == 2, "the owner sums both")
        assert not pulling.done()
        slow.go_on.set()
        p.half.pool.release((await waiting).blocks)
        p.assert_arrived(await pulling, blocks)
        await p.owner_holds_nothing()


def renewals(p: Pair) -> int:
    return sum(isinstance(message, Renew) for message in p.owner.owner.heard)


async def test_a_question_asked_again_while_the_owner_sums_is_summed_once(slow: SlowSums) -> None:
    async with pair(verify="all", read_timeout_s=0.2) as p, asyncio.TaskGroup() as group:
        lease, blocks = p.owner.whole(4)
        asked = 0
        ask_close = PeerConnection.ask_close

        def count(*arguments: Any) -> None:
            nonlocal asked
            asked += 1
            ask_close(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PeerConnection, "ask_close", count)
            pulling = group.create_task(p.pull(lease, 4))
            await until(lambda: asked == 3, "it is asked again")
            slow.go_on.set()
            p.assert_arrived(await pulling, blocks)
        assert slow.begun == [tuple(blocks)]
        answers = [m for m in p.owner.owner.sent if isinstance(m, Closed)]
        assert len(answers[0].checksums) == 4 * LAYOUT.num_kv_heads


async def test_sums_end_with_the_stream_that_asked_for_them(slow: SlowSums) -> None:
    async with pair(verify="all") as p, asyncio.TaskGroup() as group:
        lease, _ = p.owner.whole(4)
        pulling = group.create_task(failure(p.pull(lease, 4)))
        await until(lambda: bool(slow.begun), "the owner sums")
        await p.owner.stop()
        assert slow.cancelled == 1
        await pulling
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_blocks_outside_the_lease_are_not_summed() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(2)
        lease.reader = "r"
        mine = Close(lease_id=lease.lease_id, verify=tuple(lease.blocks))
        others = Close(lease_id=lease.lease_id, verify=(BlockId(9),))
        twice = Close(lease_id=lease.lease_id, verify=(*lease.blocks, lease.blocks[0]))
        assert p.owner.owner.may_verify("r", mine)
        assert not p.owner.owner.may_verify("r", twice)
        assert not p.owner.owner.may_verify("r", others)
        assert not p.owner.owner.may_verify("another", mine)


async def test_equal_bytes_have_equal_sums_in_any_dtype() -> None:
    layout = KvLayout(block_size=4, num_kv_heads=2, num_layers=1, head_dim=4, dtype="bfloat16")
    arena = Arena(layout, 3)
    arena.data[0].normal_(generator=torch.Generator().manual_seed(0))
    arena.data[2] = arena.data[0]
    sums = await checksum_blocks(arena, [BlockId(0), BlockId(1), BlockId(2)])
    first, zero, copy = sums[:2], sums[2:4], sums[4:]
    assert first == copy
    assert not set(first) & set(zero)


async def test_sums_are_the_same_whatever_is_summed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arena = Arena(OWNERS["of_the_same_order"], 5)
    arena.data.random_(0, 256, generator=torch.Generator().manual_seed(0))
    blocks = [BlockId(i) for i in (4, 0, 3, 1, 2)]
    whole = await checksum_blocks(arena, blocks)
    for at_once in (1, 2 * arena.layout.block_bytes):
        monkeypatch.setattr(checksum, "_BYTES_AT_ONCE", at_once)
        assert await checksum_blocks(arena, blocks) == whole
    assert len(set(whole)) == 5 * arena.layout.num_kv_heads


# -- arenas that lie differently ----------------------------------------------------------------


def layout(axes: tuple[Axis, ...], tp_size: int = 1, tp_rank: int = 0) -> KvLayout:
    """Of a model of four KV heads."""
    return KvLayout(
        block_size=4,
        num_kv_heads=4 // tp_size,
        num_layers=2,
        head_dim=4,
        dtype="uint8",
        tp_size=tp_size,
        tp_rank=tp_rank,
        axes=axes,
    )


OWNERS = {
    "of_the_same_order": layout(BLOCK_FIRST),
    "layer_first": layout(LAYER_FIRST),
    "tokens_before_heads": layout(("block", "token", "side", "head", "layer")),
}
READERS = {
    "of_all_heads": layout(BLOCK_FIRST),
    "of_the_last_heads": layout(BLOCK_FIRST, tp_size=2, tp_rank=1),
    "layer_first_of_one_head": layout(LAYER_FIRST, tp_size=4, tp_rank=2),
}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damaged", [False, True])
async def test_arenas_that_lie_differently_are_compared_too(
    owner: str, reader: str, *, damaged: bool
) -> None:
    async with pair(verify="all", layouts=(OWNERS[owner], READERS[reader])) as p:
        start_read = p.half.transport.start_read

        def read_and_damage(
            peer: ShardId, plan: ReadPlan, sealed: Sealed | None
        ) -> "asyncio.Future[ReadStats]":
            assert sealed is None, "checksums come with the owner's answer"
            read = start_read(peer, plan)
            last = int(plan.rows[-1][1] + plan.rows[-1][2]) - 1
            p.half.arena.data.view(-1)[last] ^= 1
            return read

        if damaged:
            p.half.transport.start_read = read_and_damage  # type: ignore[method-assign]
        lease, _ = p.owner.whole(3)
        pulling = p.pull(lease, 3, cached=1)
        if damaged:
            with pytest.raises(TransferFailed) as caught:
                await pulling
            assert caught.value.cause is TransferCause.CHECKSUM
        else:
            p.half.pool.release((await pulling).blocks)
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_an_owner_that_cannot_sum_all_of_its_ranks_is_not_believed() -> None:
    """It offers the arenas of two ranks, and its door sums those of one."""
    first, second = (layout(BLOCK_FIRST, tp_size=2, tp_rank=rank) for rank in range(2))
    async with pair(verify="all", layouts=(first, layout(BLOCK_FIRST))) as p:
        shards = p.owner.hello.shards
        p.owner.hello = replace(p.owner.hello, shards=(*shards, replace(shards[0], layout=second)))
        lease, _ = p.owner.whole(3)
        with pytest.raises(TransferFailed, match="has 6 of 12 checksums") as caught:
            await p.pull(lease, 3)
        assert caught.value.cause is TransferCause.NOT_CONFIRMED
        p.assert_reader_holds_nothing()


@pytest.mark.parametrize("count", [1, 5, 16, 17, 100])
def test_a_sample_is_one_in_sixteen_and_at_least_one(count: int) -> None:
    for seed in range(40):
        picked = pick_blocks("sample", count, seed)
        assert len(picked) in {count // 16, -(-count // 16)} - {0}
        assert all(0 <= i < count for i in picked)
    assert {i for seed in range(40) for i in pick_blocks("sample", count, seed)} == set(
        range(count)
    )
