from dataclasses import replace

from core.ids import BlockHash, WorkerId
from core.messages import KvEvents, KvRemoved, KvSnapshot, KvStored
from router.index import PrefixIndex
from router.view import WorkerView
from tests.router.views import CHAIN, HELLO, IDLE

A, B, C = CHAIN[:3]


def new_view() -> WorkerView:
    return WorkerView(HELLO, PrefixIndex().join(WorkerId("w")))


def stored(number: int, *hashes: BlockHash) -> KvEvents:
    return KvEvents(first_number=number, events=(KvStored(parent=A, hashes=hashes),))


def view_of(*hashes: BlockHash, next_number: int = 1) -> WorkerView:
    view = new_view()
    view.apply_snapshot(KvSnapshot(next_number=next_number, hashes=hashes))
    return view


# -- load ---------------------------------------------------------------------------------------


def test_a_submit_counts_until_a_report_holds_it() -> None:
    view = new_view()
    view.submitted(1, 100, 0)
    view.submitted(2, 30, 0)
    assert (view.unseen_tokens, view.unseen_submits) == (130, 2)
    view.reported(replace(IDLE, last_submit=1))
    assert (view.unseen_tokens, view.unseen_submits) == (30, 1)


def test_submits_no_report_ever_shows_all_count_and_take_bounded_memory() -> None:
    view = new_view()
    for number in range(1, 10_001):
        view.submitted(number, 3, 0)
    assert view.unseen_tokens == 30_000
    assert view.unseen_submits < 5000
    view.reported(replace(IDLE, last_submit=10_000))
    assert (view.unseen_tokens, view.unseen_submits) == (0, 0)


def test_a_leg_that_ended_before_any_report_counts_no_more() -> None:
    view = new_view()
    view.submitted(1, 100, 0)
    view.submitted(2, 7, 0)
    view.ended(1)
    view.ended(1)
    assert view.unseen_tokens == 7
    view.reported(replace(IDLE, last_submit=2))
    assert view.unseen_tokens == 0


def test_capacity_is_the_context_or_the_arena() -> None:
    assert new_view().capacity_tokens == 400
    view = WorkerView(replace(HELLO, context_tokens=300), PrefixIndex().join(WorkerId("w")))
    assert view.capacity_tokens == 300


# -- cache --------------------------------------------------------------------------------------


def test_events_in_order_are_applied() -> None:
    view = view_of()
    assert view.apply_events(stored(1, A, B))
    removed = KvEvents(first_number=2, events=(KvRemoved(hashes=(B,)),))
    assert view.apply_events(removed)
    assert view.holdings.depth([A, B]) == 1


def test_a_gap_asks_for_one_snapshot_and_changes_nothing() -> None:
    view = view_of(A)
    assert not view.apply_events(stored(2, B))
    assert view.apply_events(stored(3, C))
    assert view.holdings.depth([A, B]) == 1


def test_a_gap_after_the_snapshot_asks_again() -> None:
    view = view_of(A)
    assert not view.apply_events(stored(2, B))
    view.apply_snapshot(KvSnapshot(next_number=4, hashes=(A, B)))
    assert not view.apply_events(stored(5, C))
    assert view.holdings.depth([A, B, C]) == 2


def test_events_a_snapshot_holds_already_are_skipped() -> None:
    view = view_of(A, next_number=3)
    old = KvEvents(first_number=1, events=(KvRemoved(hashes=(A,)), KvRemoved(hashes=(A,))))
    assert view.apply_events(old)
    assert view.holdings.depth([A]) == 1


def test_of_events_that_overlap_a_snapshot_the_new_ones_count() -> None:
    view = view_of(A, next_number=2)
    both = KvEvents(
        first_number=1, events=(KvRemoved(hashes=(A,)), KvStored(parent=A, hashes=(B,)))
    )
    assert view.apply_events(both)
    assert view.holdings.depth([A, B]) == 2


def test_events_before_the_first_snapshot_are_in_it() -> None:
    view = new_view()
    assert view.apply_events(stored(7, B))
    assert view.holdings.depth([B]) == 0


def test_a_snapshot_replaces_what_was_known_only_when_complete() -> None:
    view = view_of(A)
    view.apply_snapshot(KvSnapshot(next_number=9, hashes=(B,), last=False))
    assert (view.holdings.depth([A]), view.holdings.depth([B])) == (1, 0)
    view.apply_snapshot(KvSnapshot(next_number=9, hashes=(C,), last=True))
    assert [view.holdings.depth([h]) for h in (A, B, C)] == [0, 1, 1]
    assert view.apply_events(stored(9, A))
