"""What a seal says instead of its owner, and where it is not asked."""

import numpy as np
import pytest

from core.clock import FakeClock
from core.errors import TransferFailed
from core.ids import BlockId, RequestId, SequenceId
from engine.pool import BlockPool
from kv_transfer.bound import BoundLease
from kv_transfer.client import PeerConnection
from kv_transfer.leases import LeaseTable
from kv_transfer.messages import Abort, Close, Closed, FromOwner, FromReader, Seal
from kv_transfer.metrics import LeaseEnd
from kv_transfer.seals import Seals
from tests.builders import soon, until
from tests.kv_transfer.halves import LAST, LEASE_S, Pair, cache, pair

SEQUENCE = SequenceId(RequestId("r"))


# -- the words ----------------------------------------------------------------------------------


def test_a_seal_is_whole_until_it_is_broken_and_none_like_it_comes_again() -> None:
    seals = Seals(slots=1)
    seen: set[int] = set()
    for _ in range(5):
        seal = seals.set_one()
        assert seal is not None
        assert seals.is_whole(seal)
        assert seals.set_one() is None, "all slots are taken"
        seals.break_one(seal)
        assert not seals.is_whole(seal)
        seen.add(seal.word)
    assert len(seen) == 5
    assert np.count_nonzero(seals.words) == 0


def test_two_lives_have_no_word_in_common() -> None:
    lives = Seals(slots=100), Seals(slots=100)
    words = [{seal.word for _ in range(100) if (seal := life.set_one())} for life in lives]
    assert not words[0] & words[1]


class LeftBehind(BlockPool):
    """Notes how many seals are whole while blocks are let go."""

    def __init__(self, seals: Seals) -> None:
        super().__init__(8)
        self._seals = seals
        self.whole: list[int] = []

    def unlease(self, block_ids: list) -> None:  # type: ignore[override,type-arg]
        self.whole.append(int(np.count_nonzero(self._seals.words)))
        super().unlease(block_ids)


@pytest.mark.parametrize("end", ["close", "abort", "expire"])
def test_a_seal_is_whole_from_the_last_announcement_to_the_end_and_breaks_before_the_blocks(
    end: str,
) -> None:
    seals, clock = Seals(), FakeClock()
    pool = LeftBehind(seals)
    table = LeaseTable(pool, clock, LEASE_S, seals)
    lease = table.open(SEQUENCE)
    table.extend(lease, pool.allocate(2) or [])
    assert lease.seal is None
    table.finish(lease, LAST, answer_ended=False)
    seal = lease.seal
    assert seal is not None
    assert seals.is_whole(seal)
    lease.reader = "reader"
    match end:
        case "close":
            table.close(lease.lease_id, "reader")
        case "abort":
            table.abort(lease.lease_id)
        case _:
            clock.advance(LEASE_S)
            table.sweep()
    assert pool.whole == [0]
    assert not seals.is_whole(seal)


def test_neither_an_answer_that_has_ended_nor_a_move_has_a_seal() -> None:
    seals = Seals()
    table = LeaseTable(BlockPool(8), FakeClock(), LEASE_S, seals)
    for moves, ended in ((True, False), (False, True)):
        lease = table.open(SEQUENCE, moves=moves)
        table.finish(lease, LAST, answer_ended=ended)
        assert lease.seal is None
    assert np.count_nonzero(seals.words) == 0


# -- the hand-off -------------------------------------------------------------------------------


def no_answer(message: FromOwner) -> list[FromOwner]:
    return [] if isinstance(message, Closed) else [message]


def no_abort(message: FromOwner) -> list[FromOwner]:
    return [] if isinstance(message, Abort) else [message]


class Deaf:
    """Hears no closing question for as long as it `lasts`."""

    def __init__(self) -> None:
        self.lasts = True
        self.missed = 0

    def __call__(self, message: FromReader) -> list[FromReader]:
        if self.lasts and isinstance(message, Close):
            self.missed += 1
            return []
        return [message]


async def test_blocks_are_usable_though_the_owner_does_not_answer() -> None:
    async with pair() as p:
        p.owner.owner.says = no_answer
        lease, blocks = p.owner.whole(3)
        pulled = await soon(p.pull(lease, 3))
        assert pulled.stats.sealed
        p.assert_arrived(pulled, blocks)
        await p.owner_holds_nothing()
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1
        assert p.reader.metrics.pair(p.owner.hello.worker_id).sealed == 1


async def test_whoever_waits_has_the_blocks_before_the_question_is_even_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[bool] = []
    ask = PeerConnection.ask_close

    def note(self: PeerConnection, lease: BoundLease, verify: tuple[BlockId, ...]) -> None:
        done.append(pulling.done())
        ask(self, lease, verify)

    monkeypatch.setattr(PeerConnection, "ask_close", note)
    async with pair() as p:
        p.half.transport.holds = True
        lease, blocks = p.owner.whole(3)
        pulling = p.pull_soon(lease, 3)
        await until(lambda: p.half.transport.waiting == 1)
        p.half.transport.let_go()
        p.assert_arrived(await soon(pulling), blocks)
        await p.owner_holds_nothing()
    assert done == [True]


async def test_an_owner_that_has_not_heard_so_is_told_again() -> None:
    async with pair(lease_s=0.15) as p:
        p.owner.owner.hears = deaf = Deaf()
        lease, blocks = p.owner.whole(3)
        p.assert_arrived(await soon(p.pull(lease, 3)), blocks)
        await until(lambda: deaf.missed >= 2, "asked again")
        assert p.owner.pool.counts().held == 3
        deaf.lasts = False
        await p.owner_holds_nothing()
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1


async def test_where_the_seal_is_broken_the_question_decides() -> None:
    async with pair() as p:
        p.owner.owner.says = no_abort
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        pulling = p.pull_soon(lease, 3)
        await until(lambda: p.half.transport.waiting == 1)
        p.owner.owner.abort(lease.lease_id, "gone")
        p.half.transport.let_go()
        with pytest.raises(TransferFailed, match="did not confirm the blocks: ABORTED"):
            await soon(pulling)
        p.assert_reader_holds_nothing()


async def test_a_seal_read_while_others_still_write_vouches_for_nothing() -> None:
    async with pair() as p:
        p.owner.owner.says = no_abort
        p.half.transport.holds = True
        lease, blocks = p.owner.open(4)
        pulling = p.pull_soon(lease, 4)
        await until(lambda: lease.reader is not None, "the reader bound")
        p.owner.owner.announce(lease, blocks[:2])
        await until(lambda: p.half.transport.waiting == 1)
        p.half.transport.holds = False
        p.owner.owner.finish(lease, blocks[2:], LAST, ended=False)
        await until(lambda: p.half.transport.reads == 2)
        p.owner.owner.abort(lease.lease_id, "gone")
        p.half.transport.let_go()
        with pytest.raises(TransferFailed, match="did not confirm the blocks: ABORTED"):
            await soon(pulling)


async def test_an_announcement_that_comes_late_is_no_answer() -> None:
    async with pair(lease_s=0.15) as p:
        p.owner.owner.hears = deaf = Deaf()
        lease, blocks = p.owner.whole(3)
        p.assert_arrived(await soon(p.pull(lease, 3)), blocks)
        p.owner.owner._tell(lease, 0)
        await until(lambda: deaf.missed >= 2, "asked again")
        deaf.lasts = False
        await p.owner_holds_nothing()
        assert p.owner.table.counters.ended[LeaseEnd.CLOSED] == 1


async def test_an_abort_that_was_heard_counts_more_than_a_seal_that_was_whole() -> None:
    async with pair() as p:
        p.half.transport.holds = True
        lease, _ = p.owner.whole(3)
        pulling = p.pull_soon(lease, 3)
        await until(lambda: p.half.transport.waiting == 1)
        seal = lease.seal
        p.owner.owner.abort(lease.lease_id, "gone")
        assert seal is not None
        p.owner.seals.words[seal.slot] = seal.word
        await until(pulling.done)
        p.half.transport.let_go()
        with pytest.raises(TransferFailed, match="gone"):
            await pulling


async def test_a_cached_prefix_needs_no_answer_either() -> None:
    async with pair() as p:
        p.owner.owner.says = no_answer
        blocks = cache(p.owner.pool, 4)
        fetched = await soon(p.fetch(4))
        assert fetched.stats.sealed
        p.assert_arrived(fetched, blocks)
        await p.owner_holds_nothing()


async def test_what_was_cached_here_but_for_a_read_in_between_is_confirmed_all_the_same() -> None:
    async with pair() as p:
        lease, blocks = p.owner.whole(4)
        pulled = await soon(p.pull(lease, 4, cached=2))
        assert (pulled.cached_blocks, pulled.stats.sealed) == (2, True)
        p.assert_arrived(pulled, blocks[2:])


async def without(p: Pair) -> None:
    """The owner is waited for."""
    lease, blocks = p.owner.whole(3)
    pulled = await soon(p.pull(lease, 3))
    assert not pulled.stats.sealed
    assert pulled.tokens == LAST
    p.half.pool.release(pulled.blocks)
    await p.owner_holds_nothing()
    assert len(blocks) == 3


async def test_no_seal_is_asked_where_that_is_switched_off() -> None:
    async with pair(seals=False) as p:
        await without(p)


async def test_nor_of_an_owner_whose_ranks_are_read_each_for_itself() -> None:
    async with pair() as p:
        p.owner.split_in_two()
        await without(p)


async def test_nor_where_the_owner_has_none_left() -> None:
    async with pair() as p:
        while p.owner.seals.set_one() is not None:
            pass
        await without(p)


async def test_nor_where_checksums_are_to_come() -> None:
    async with pair(verify="all") as p:
        await without(p)


def test_a_seal_of_no_slot_is_not_whole() -> None:
    assert not Seals(slots=2).is_whole(Seal(slot=7, word=1))
