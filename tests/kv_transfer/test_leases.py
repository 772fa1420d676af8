"""Leases one rule at a time, then owner and readers in random order against the one promise."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.clock import FakeClock
from core.errors import InternalError
from core.ids import BlockId, Incarnation, LeaseId, ModelId, RequestId, SequenceId, WorkerId
from core.kv import KvLayout
from engine.pool import BlockPool
from kv_transfer.leases import Lease, LeaseTable
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    FromOwner,
    LeaseOutcome,
    Memory,
    PeerHello,
    Renew,
    Shard,
)
from kv_transfer.owner import Owner
from tests.builders import QUICK

LEASE_S = 10.0
READER, OTHER = "reader", "other"
SEQUENCE = SequenceId(RequestId("r"))
LAYOUT = KvLayout(block_size=4, num_kv_heads=1, num_layers=1, head_dim=4, dtype="uint8")
MEMORY = Memory(transport="loopback", metadata=b"", address=0, nbytes=0, device="cpu")
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
    assert t.table.close(lease.lease_id, READER) is LeaseOutcome.HELD
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
    assert t.table.counters.closed == 1


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
    assert t.table.counters.closed == 1


def test_counters_add_up() -> None:
    t = Table()
    for end in (
        lambda lease: t.table.close(lease.lease_id, READER),
        lambda lease: t.table.abort(lease.lease_id),
        lambda lease: t.clock.advance(LEASE_S),
        lambda lease: None,
    ):
        end(t.open(1))
        t.table.sweep()
    c = t.table.counters
    assert (c.opened, c.closed, c.aborted, c.expired) == (4, 1, 1, 1)
    assert len(t.table.all()) == 1


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


# -- owner and readers in random order ----------------------------------------------------------


def hello(name: str) -> PeerHello:
    return PeerHello(
        worker_id=WorkerId(name),
        incarnation=Incarnation(name),
        model_id=ModelId("m"),
        shards=(Shard(layout=LAYOUT, memories=(MEMORY,)),),
    )


class ReaderModel:
    """One reader: what was announced to it, and what the blocks held at that time."""

    def __init__(self, owner: Owner, content: dict[BlockId, int]) -> None:
        self._owner = owner
        self._content = content
        self.announced: dict[LeaseId, dict[BlockId, int]] = {}
        self.final: set[LeaseId] = set()
        self.confirmed: set[LeaseId] = set()
        self.name = owner.attach(hello("r"), self.hear)

    def hear(self, message: FromOwner) -> None:
        match message:
            case Announce():
                seen = self.announced.setdefault(message.lease_id, {})
                seen.update({b: self._content[b] for b in message.block_ids})
                if message.final:
                    self.final.add(message.lease_id)
            case Closed(outcome=LeaseOutcome.HELD):
                assert message.lease_id in self.final
                if message.lease_id not in self.confirmed:  # asked again, they may be reused
                    seen = self.announced[message.lease_id]
                    assert seen == {b: self._content[b] for b in seen}, "reused under a lease"
                self.confirmed.add(message.lease_id)
            case Abort():
                self.announced.pop(message.lease_id, None)
                self.final.discard(message.lease_id)
            case _:
                pass

    def reconnect(self) -> None:
        self._owner.detach(self.name)
        self.announced, self.final = {}, set()
        self.name = self._owner.attach(hello("r"), self.hear)


class Prefill:
    """A prefill in progress: its lease, its blocks, how many are announced."""

    def __init__(self, lease: Lease, blocks: list[BlockId]) -> None:
        self.lease = lease
        self.blocks = blocks
        self.announced = 0


class HandoffMachine(RuleBasedStateMachine):
    """The promise: HELD means that no announced block was reused since it was announced.

    `content` numbers what a block holds: it changes whenever the block is allocated anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.pool = BlockPool(8)
        self.table = LeaseTable(self.pool, self.clock, LEASE_S)
        self.owner = Owner(self.table, lambda: None)
        self.content: dict[BlockId, int] = {}
        self.writes = 0
        self.readers = [ReaderModel(self.owner, self.content) for _ in range(2)]
        self.prefills: list[Prefill] = []
        self.ids: list[LeaseId] = []

    @rule(count=st.integers(1, 4))
    def start_prefill(self, count: int) -> None:
        blocks = self.pool.allocate(count)
        if blocks is None:
            return
        for block in blocks:
            self.writes += 1
            self.content[block] = self.writes
        lease = self.owner.open(SEQUENCE)
        self.ids.append(lease.lease_id)
        self.prefills.append(Prefill(lease, blocks))

    @precondition(lambda self: self.prefills)
    @rule(data=st.data())
    def announce(self, data: st.DataObject) -> None:
        prefill = data.draw(st.sampled_from(self.prefills))
        if prefill.announced < len(prefill.blocks) - 1:
            self.owner.announce(prefill.lease, [prefill.blocks[prefill.announced]])
            prefill.announced += 1

    @precondition(lambda self: self.prefills)
    @rule(data=st.data(), ended=st.sampled_from([False, False, False, True]))
    def finish(self, data: st.DataObject, ended: bool) -> None:
        prefill = data.draw(st.sampled_from(self.prefills))
        self.prefills.remove(prefill)
        rest = prefill.blocks[prefill.announced :]
        self.owner.finish(prefill.lease, rest, (1,), ended=ended)
        self.pool.release(prefill.blocks)

    @precondition(lambda self: self.prefills)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        prefill = data.draw(st.sampled_from(self.prefills))
        self.prefills.remove(prefill)
        self.pool.release(prefill.blocks)
        self.owner.abort(prefill.lease.lease_id, "cancelled")

    @precondition(lambda self: self.ids)
    @rule(data=st.data(), reader=st.integers(0, 1), first_index=st.integers(0, 2))
    def bind(self, data: st.DataObject, reader: int, first_index: int) -> None:
        lease_id = data.draw(st.sampled_from(self.ids[-4:]))
        bind = Bind(lease_id=lease_id, sequence_id=SEQUENCE, first_index=first_index)
        if lease_id not in self.readers[reader].announced:
            self.owner.handle(self.readers[reader].name, bind)

    @precondition(lambda self: self.ids)
    @rule(
        data=st.data(),
        reader=st.integers(0, 1),
        kind=st.sampled_from(["close", "close", "renew", "abort"]),
    )
    def reader_says(self, data: st.DataObject, reader: int, kind: str) -> None:
        known = list(self.readers[reader].final) or self.ids[-4:]
        lease_id = data.draw(st.sampled_from(known))
        messages: dict[str, Close | Renew | Abort] = {
            "close": Close(lease_id=lease_id),
            "renew": Renew(lease_ids=(lease_id,)),
            "abort": Abort(lease_id=lease_id, reason="enough"),
        }
        if kind == "close" and lease_id not in self.readers[reader].final:
            return  # a reader asks only after the last announcement
        self.owner.handle(self.readers[reader].name, messages[kind])

    @rule(reader=st.integers(0, 1))
    def reader_lost(self, reader: int) -> None:
        self.readers[reader].reconnect()

    @rule(seconds=st.sampled_from([1.0, 4.0, 11.0]), sweeps=st.booleans())
    def time_passes(self, seconds: float, sweeps: bool) -> None:
        self.clock.advance(seconds)
        if sweeps:
            self.owner.sweep()

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        self.table.check()
        c = self.table.counters
        assert c.opened == c.closed + c.aborted + c.expired + len(self.table.all())

    def teardown(self) -> None:
        for prefill in self.prefills:
            self.pool.release(prefill.blocks)
            self.owner.abort(prefill.lease.lease_id, "the end")
        self.clock.advance(2 * LEASE_S)
        self.owner.sweep()
        self.pool.check_idle()
        assert self.pool.counts().held == 0


def test_held_means_held_whatever_happens_in_between() -> None:
    run_state_machine_as_test(
        HandoffMachine, settings=settings(QUICK, max_examples=80, stateful_step_count=40)
    )
