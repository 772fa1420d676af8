"""Checksums: what differs from the owner's is never used."""

import pytest
import torch

from core.errors import TransferCause, TransferFailed
from core.ids import BlockId
from core.kv import KvLayout
from engine.arena import Arena
from kv_transfer.checksum import VerifyMode, checksum_blocks, pick_blocks
from kv_transfer.messages import Close, Closed, FromOwner
from tests.kv_transfer.halves import Pair, pair


def flip_a_byte_of(p: Pair, index: int) -> None:
    """Damage block `index` of the next pull between its read and the closing question."""
    start_read = p.half.transport.start_read

    def damaged(peer, plan):  # type: ignore[no-untyped-def]
        read = start_read(peer, plan)
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
        assert p.owner.table.counters.closed == 1


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
        assert [isinstance(m, Closed) and len(m.checksums) for m in lost] == [4]
        p.assert_reader_holds_nothing()
        await p.owner_holds_nothing()


async def test_blocks_outside_the_lease_are_not_summed() -> None:
    async with pair() as p:
        lease, _ = p.owner.whole(2)
        lease.reader = "r"
        mine = Close(lease_id=lease.lease_id, verify=tuple(lease.blocks))
        others = Close(lease_id=lease.lease_id, verify=(BlockId(9),))
        assert p.owner.owner.may_verify("r", mine)
        assert not p.owner.owner.may_verify("r", others)
        assert not p.owner.owner.may_verify("another", mine)


async def test_equal_bytes_have_equal_sums_in_any_dtype() -> None:
    layout = KvLayout(block_size=4, num_kv_heads=2, num_layers=1, head_dim=4, dtype="bfloat16")
    arena = Arena(layout, 3)
    arena.data[0].normal_(generator=torch.Generator().manual_seed(0))
    arena.data[2] = arena.data[0]
    first, zero, copy = await checksum_blocks(arena, [BlockId(0), BlockId(1), BlockId(2)])
    assert first == copy != zero


@pytest.mark.parametrize("count", [1, 5, 16, 17, 100])
def test_a_sample_is_one_in_sixteen_and_at_least_one(count: int) -> None:
    for seed in range(40):
        picked = pick_blocks("sample", count, seed)
        assert len(picked) in {count // 16, -(-count // 16)} - {0}
        assert all(0 <= i < count for i in picked)
    assert {i for seed in range(40) for i in pick_blocks("sample", count, seed)} == set(
        range(count)
    )
