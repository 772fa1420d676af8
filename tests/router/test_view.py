from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from core.ids import BlockHash, Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvEvents, KvRemoved, KvSnapshot, KvStored, LoadReport, WorkerHello
from router.view import WorkerView
from tests.builders import QUICK

HELLO = WorkerHello(
    worker_id=WorkerId("w"),
    incarnation=Incarnation("i"),
    role=Role.PREFILL,
    epoch=1,
    model_id=ModelId("m"),
    layout=KvLayout(block_size=4, num_kv_heads=1, num_layers=1, head_dim=4, dtype="uint8"),
    num_blocks=100,
    context_tokens=1000,
    peer_address="",
)
LOAD = LoadReport(
    last_submit=0,
    queued_tokens=0,
    waiting=0,
    running=0,
    context_tokens=0,
    free_blocks=100,
    total_blocks=100,
)
A, B, C = (BlockHash(bytes([i]) * 16) for i in range(3))


def stored(number: int, *hashes: BlockHash) -> KvEvents:
    return KvEvents(first_number=number, events=(KvStored(parent=A, hashes=hashes),))


def view_of(*hashes: BlockHash, next_number: int = 1) -> WorkerView:
    view = WorkerView(HELLO)
    view.apply_snapshot(KvSnapshot(next_number=next_number, hashes=hashes))
    return view


# -- load ---------------------------------------------------------------------------------------


def test_a_submit_counts_until_a_report_holds_it() -> None:
    view = WorkerView(HELLO)
    view.submitted(1, 100)
    view.submitted(2, 30)
    assert (view.unseen_tokens, view.unseen_submits) == (130, 2)
    view.reported(replace(LOAD, last_submit=1))
    assert (view.unseen_tokens, view.unseen_submits) == (30, 1)


def test_a_leg_that_ended_before_any_report_counts_no_more() -> None:
    view = WorkerView(HELLO)
    view.submitted(1, 100)
    view.ended(1)
    view.ended(1)
    assert view.unseen_tokens == 0


def test_capacity_is_the_context_or_the_arena() -> None:
    assert WorkerView(HELLO).capacity_tokens == 400
    assert WorkerView(replace(HELLO, context_tokens=300)).capacity_tokens == 300


# -- cache --------------------------------------------------------------------------------------


def test_events_in_order_are_applied() -> None:
    view = view_of()
    assert view.apply_events(stored(1, A, B))
    removed = KvEvents(first_number=2, events=(KvRemoved(hashes=(B,)),))
    assert view.apply_events(removed)
    assert view.cached_blocks([A, B]) == 1


def test_a_gap_asks_for_a_snapshot_and_changes_nothing() -> None:
    view = view_of(A)
    assert not view.apply_events(stored(2, B))
    assert view.cached_blocks([A, B]) == 1


def test_events_a_snapshot_holds_already_are_skipped() -> None:
    view = view_of(A, next_number=3)
    old = KvEvents(first_number=1, events=(KvRemoved(hashes=(A,)), KvRemoved(hashes=(A,))))
    assert view.apply_events(old)
    assert view.cached_blocks([A]) == 1


def test_of_events_that_overlap_a_snapshot_the_new_ones_count() -> None:
    view = view_of(A, next_number=2)
    both = KvEvents(
        first_number=1, events=(KvRemoved(hashes=(A,)), KvStored(parent=A, hashes=(B,)))
    )
    assert view.apply_events(both)
    assert view.cached_blocks([A, B]) == 2


def test_events_before_the_first_snapshot_are_in_it() -> None:
    view = WorkerView(HELLO)
    assert view.apply_events(stored(7, B))
    assert view.cached_blocks([B]) == 0


def test_a_snapshot_replaces_what_was_known_only_when_complete() -> None:
    view = view_of(A)
    view.apply_snapshot(KvSnapshot(next_number=9, hashes=(B,), last=False))
    assert (view.cached_blocks([A]), view.cached_blocks([B])) == (1, 0)
    view.apply_snapshot(KvSnapshot(next_number=9, hashes=(C,), last=True))
    assert [view.cached_blocks([h]) for h in (A, B, C)] == [0, 1, 1]
    assert view.apply_events(stored(9, A))


@QUICK
@given(st.integers(0, 40), st.integers(0, 40))
def test_the_longest_cached_prefix_is_found_by_bisection(held: int, asked: int) -> None:
    chain = [BlockHash(i.to_bytes(16, "big")) for i in range(40)]
    assert view_of(*chain[:held]).cached_blocks(chain[:asked]) == min(held, asked)
