"""Leases one rule at a time; test_interleavings.py has them in any order."""

import pytest

from core.clock import FakeClock
from core.errors import InternalError
from core.ids import BlockId, Incarnation, LeaseId, RequestId, SequenceId, WorkerId
from engine.pool import BlockPool
from kv_transfer.leases import Lease, LeaseTable, reader_name
from kv_transfer.messages import LeaseOutcome
from kv_transfer.metrics import LeaseCounters, LeaseEnd

LEASE_S = 10.0
READER, OTHER = "reader", "other"
SEQUENCE = SequenceId(RequestId("r"))
LAST = (7,)


class Table:
    """A lease table over a pool of 8 blocks and a clock that is told."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.pool = BlockPool(8)
        self.table = LeaseTable(self.pool, self.clock, LEASE_S)

    def open(self, blocks: int = 2, *, reader: str | None = READER, finished: bool = True) -> Lease:
        """A lease whose running references are gone."""
        lease = self.table.open(SEQUENCE)
        taken = self.pool.allocate(blocks) or []
        self.table.extend(lease, taken)
        self.pool.release(taken)
        lease.reader = reader
        if finished:
            self.table.finish(lease, LAST, answer_ended=False)
        self.table.check()
        return lease

    def held(self) -> int:
        self.pool.check()
        self.table.check()
        return self.pool.counts().held


def test_a_close_by_its_reader_says_held_and_frees_the_blocks() -> None:
    t = Table()
    lease = t.open()
    assert t.held() == 2
    told: list[tuple[LeaseOutcome, int]] = []

    def tell(outcome: LeaseOutcome) -> None:
        told.append((outcome, t.held()))

    assert t.table.close(lease.lease_id, READER, tell) is LeaseOutcome.HELD
    assert told == [(LeaseOutcome.HELD, 2)], "the answer comes before the blocks are let go"
    assert t.held() == 0


def test_a_lease_expires_without_renewal() -> None:
    t = Table()
    lease = t.open()
    t.clock.advance(LEASE_S - 0.1)
    assert t.table.sweep() == []
    t.clock.advance(0.1)
    assert t.table.sweep() == [lease]
    assert t.held() == 0
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.EXPIRED


def test_the_closing_question_itself_sees_the_expiry() -> None:
    t = Table()
    lease = t.open()
    t.clock.advance(LEASE_S)
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.EXPIRED


def test_a_lease_cannot_expire_while_its_prefill_runs() -> None:
    t = Table()
    lease = t.open(finished=False)
    t.clock.advance(1000 * LEASE_S)
    assert t.table.sweep() == []
    t.table.finish(lease, LAST, answer_ended=False)
    t.clock.advance(LEASE_S - 0.1)
    assert t.table.sweep() == []


def test_a_renewal_lets_it_live_a_full_length_from_now() -> None:
    t = Table()
    lease = t.open()
    t.clock.advance(LEASE_S - 1)
    t.table.renew([lease.lease_id], READER)
    t.clock.advance(LEASE_S - 1)
    assert t.table.sweep() == []
    t.clock.advance(1)
    assert t.table.sweep() == [lease]


@pytest.mark.parametrize(("bound", "renewer"), [(READER, OTHER), (READER, None), (None, READER)])
def test_nobody_else_can_renew(bound: str | None, renewer: str | None) -> None:
    t = Table()
    lease = t.open(reader=bound)
    t.clock.advance(LEASE_S - 1)
    t.table.renew([lease.lease_id], renewer)
    t.clock.advance(1)
    assert t.table.sweep() == [lease]


def test_the_router_renews_while_no_reader_is_bound() -> None:
    t = Table()
    lease = t.open(reader=None)
    t.clock.advance(LEASE_S - 1)
    t.table.renew([lease.lease_id], None)
    t.clock.advance(1)
    assert t.table.sweep() == []


def test_renewing_does_not_start_the_clock_of_a_running_prefill() -> None:
    t = Table()
    lease = t.open(finished=False)
    t.table.renew([lease.lease_id], READER)
    t.clock.advance(100 * LEASE_S)
    assert t.table.sweep() == []


def test_close_may_be_asked_again() -> None:
    t = Table()
    lease = t.open()
    answers = [t.table.close(lease.lease_id, READER) for _ in range(3)]
    assert answers == [LeaseOutcome.HELD] * 3
    assert t.table.counters.ended[LeaseEnd.CLOSED] == 1


def test_an_ended_lease_is_forgotten_after_twice_its_length() -> None:
    t = Table()
    lease = t.open()
    t.table.close(lease.lease_id, READER)
    t.clock.advance(2 * LEASE_S - 0.1)
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.HELD
    t.clock.advance(0.1)
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.UNKNOWN


def test_an_id_never_given_out_is_unknown() -> None:
    assert Table().table.close(LeaseId(99), READER) is LeaseOutcome.UNKNOWN


def test_a_close_by_another_reader_is_not_answered_and_ends_nothing() -> None:
    t = Table()
    lease = t.open()
    assert t.table.close(lease.lease_id, OTHER) is LeaseOutcome.UNKNOWN
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.HELD


def test_a_close_before_the_prefill_has_ended_is_not_held() -> None:
    t = Table()
    lease = t.open(finished=False)
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.UNKNOWN
    assert t.held() == 2


def test_an_abort_frees_the_blocks_and_is_remembered() -> None:
    t = Table()
    lease = t.open()
    assert t.table.abort(lease.lease_id) is lease
    assert t.held() == 0
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.ABORTED
    assert t.table.abort(lease.lease_id) is None


def test_an_ended_lease_takes_no_more_blocks() -> None:
    t = Table()
    lease = t.open(finished=False)
    t.table.abort(lease.lease_id)
    t.table.extend(lease, t.pool.allocate(2) or [])
    assert t.held() == 0


def test_an_unread_lease_counts_as_closed_and_its_reader_gets_no_held() -> None:
    t = Table()
    lease = t.open()
    t.table.finish_unread(lease)
    assert t.held() == 0
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.ABORTED
    assert t.table.counters.ended[LeaseEnd.CLOSED] == 1


def test_counters_add_up() -> None:
    t = Table()
    for end in (
        lambda lease: t.table.close(lease.lease_id, READER),
        lambda lease: t.table.abort(lease.lease_id),
        lambda lease: t.table.abort(lease.lease_id, LeaseOutcome.WITHDRAWN),
        lambda lease: t.clock.advance(LEASE_S),
        lambda lease: None,
    ):
        end(t.open(1))
        t.table.sweep()
    c = t.table.counters
    assert (c.opened, c.ended) == (5, dict.fromkeys(LeaseEnd, 1))
    assert len(t.table.all()) == 1


def test_ends_are_counted_by_the_worker_that_was_bound() -> None:
    t = Table()
    for number in (1, 2):  # two streams of one worker's two lives
        name = reader_name(WorkerId("rack/1"), Incarnation(f"life{number}"), number)
        t.table.close(t.open(1, reader=name).lease_id, name)
    t.table.abort(t.open(1, reader=None).lease_id, LeaseOutcome.WITHDRAWN)
    assert t.table.counters.by_reader == {
        "rack/1": {LeaseEnd.CLOSED: 2},
        "": {LeaseEnd.WITHDRAWN: 1},
    }


def test_the_oldest_reader_counted_makes_room() -> None:
    counters = LeaseCounters(keep=2)
    for reader in ("a", "b", "a", "c"):
        counters.end(WorkerId(reader), LeaseEnd.CLOSED)
    assert list(counters.by_reader) == ["b", "c"]
    assert counters.ended == {LeaseEnd.CLOSED: 4}


def test_check_finds_a_lease_the_pool_does_not_know() -> None:
    t = Table()
    t.open().blocks.append(BlockId(7))
    with pytest.raises(InternalError, match="block 7 has 0 leases, not 1"):
        t.table.check()


def test_check_finds_a_reference_without_a_lease() -> None:
    t = Table()
    t.pool.lease(t.pool.allocate(1) or [])
    with pytest.raises(InternalError, match="1 leases, not 0"):
        t.table.check()
