"""From a fleet's views to a placement: what the candidates' numbers are made of."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from core.ids import BlockHash, Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LoadReport, PrefixSource, WorkerHello
from core.registry import WorkerRecord
from router.client import WorkerLink
from router.place import place_decode, place_prefill
from router.policies.base import Decision, DecodeCandidate, PrefillCandidate
from router.view import WorkerView
from tests.builders import QUICK

CHAIN = [BlockHash(i.to_bytes(16, "big")) for i in range(8)]
LOAD = LoadReport(
    last_submit=1,
    queued_tokens=30,
    waiting=2,
    running=3,
    context_tokens=500,
    free_blocks=10,
    total_blocks=100,
)


def make_link(
    name: str, *, cached: int = 0, load: LoadReport | None = LOAD, role: Role = Role.PREFILL
) -> WorkerLink:
    """A link whose stream is up, as far as placement sees."""
    model, incarnation = ModelId("m"), Incarnation(name)
    record = WorkerRecord(
        worker_id=WorkerId(name),
        incarnation=incarnation,
        role=role,
        epoch=1,
        address="",
        router_address="",
        model_id=model,
        pid=1,
    )
    link = WorkerLink(record, "router", model, 5.0)
    link.view = WorkerView(
        WorkerHello(
            worker_id=record.worker_id,
            incarnation=incarnation,
            role=role,
            epoch=1,
            model_id=model,
            layout=KvLayout(block_size=4, num_kv_heads=1, num_layers=1, head_dim=4, dtype="uint8"),
            num_blocks=100,
            context_tokens=1000,
            peer_address=f"{name}:1",
        )
    )
    link.view.load = load
    link.view.apply_snapshot(KvSnapshot(next_number=1, hashes=tuple(CHAIN[:cached])))
    return link


class TakeLast:
    """A policy that notes what it was shown and takes the last candidate."""

    def __init__(self) -> None:
        self.seen: list[PrefillCandidate | DecodeCandidate] = []

    def choose(
        self,
        tokens: int,
        workers: Sequence[PrefillCandidate] | Sequence[DecodeCandidate],
        random: Random,
    ) -> Decision:
        self.seen = list(workers)
        return Decision(worker_id=workers[-1].worker_id, candidates=())


def test_a_prefill_candidate_has_its_cache_and_everything_queued_before() -> None:
    link = make_link("a", cached=3)
    assert link.view is not None
    link.view.submitted(2, 100)
    policy = TakeLast()
    place_prefill([link], 32, CHAIN, policy, Random(0))
    assert policy.seen == [
        PrefillCandidate(worker_id=WorkerId("a"), cached_tokens=12, queued_tokens=130)
    ]


def test_the_load_of_a_prefill_is_what_is_not_cached_where_it_goes() -> None:
    placed = place_prefill(
        [make_link("a"), make_link("b", cached=3)], 32, CHAIN, TakeLast(), Random(0)
    )
    assert (placed.link.record.worker_id, placed.load_tokens) == ("b", 20)


def test_a_decode_candidate_counts_own_submits_the_worker_has_not_reported() -> None:
    link = make_link("d", role=Role.DECODE)
    assert link.view is not None
    link.view.submitted(2, 15)
    policy = TakeLast()
    placed = place_decode([link], 64, policy, Random(0))
    assert policy.seen == [
        DecodeCandidate(worker_id=WorkerId("d"), sequences=6, context_tokens=515, free_tokens=25)
    ]
    assert placed.load_tokens == 64


def test_a_worker_that_drains_or_has_not_reported_is_no_candidate() -> None:
    policy = TakeLast()
    links = [
        make_link("new", load=None),
        make_link("ok"),
        make_link("drains", load=replace(LOAD, draining=True)),
    ]
    place_prefill(links, 8, [], policy, Random(0))
    assert [candidate.worker_id for candidate in policy.seen] == ["ok"]


# -- who else has the prefix --------------------------------------------------------------------


def source_of(
    chosen: WorkerLink, *others: WorkerLink, prompt_tokens: int = 32
) -> tuple[str, int] | None:
    """Worker and blocks of the source, when `chosen` is the only candidate."""
    placed = place_prefill(
        [chosen], prompt_tokens, CHAIN, TakeLast(), Random(0), holders=[*others, chosen]
    )
    return (placed.source.worker_id, placed.source.num_blocks) if placed.source else None


def test_the_source_is_the_longest_holder_of_any_role() -> None:
    others = [make_link("p", cached=3), make_link("d", cached=5, role=Role.DECODE)]
    assert source_of(make_link("a", cached=2), *others) == ("d", 5)


def test_a_source_says_where_and_which_life_it_is() -> None:
    placed = place_prefill(
        [make_link("a")], 32, CHAIN, TakeLast(), Random(0), holders=[make_link("p", cached=3)]
    )
    assert placed.source == PrefixSource(
        worker_id=WorkerId("p"), address="p:1", incarnation=Incarnation("p"), num_blocks=3
    )


def test_nobody_is_a_source_who_holds_no_more_than_the_chosen_one() -> None:
    assert source_of(make_link("a", cached=4), make_link("p", cached=4)) is None


def test_the_block_of_the_last_token_counts_for_nobody() -> None:
    full = make_link("p", cached=8)
    assert source_of(make_link("a", cached=7), full, prompt_tokens=32) is None
    assert source_of(make_link("a", cached=6), full, prompt_tokens=32) == ("p", 7)
    assert source_of(make_link("a"), full, prompt_tokens=4) is None


def test_of_equal_holders_the_least_busy_is_read_from_then_the_first_by_name() -> None:
    busy = make_link("b", cached=5, load=replace(LOAD, running=9))
    others = [busy, make_link("d", cached=5), make_link("c", cached=5)]
    assert source_of(make_link("a"), *others) == ("c", 5)
    assert source_of(make_link("a"), *reversed(others)) == ("c", 5)


def test_a_longer_holder_is_the_source_however_busy_it_is() -> None:
    busy = make_link("b", cached=6, load=replace(LOAD, running=900))
    assert source_of(make_link("a"), make_link("c", cached=5), busy) == ("b", 6)


def test_a_worker_that_drains_can_still_be_read_from() -> None:
    leaving = make_link("b", cached=6, load=replace(LOAD, draining=True))
    assert source_of(make_link("a"), leaving) == ("b", 6)


def test_a_worker_whose_stream_has_ended_is_no_source() -> None:
    gone = make_link("b", cached=6)
    gone.view = None
    assert source_of(make_link("a"), gone) is None


@QUICK
@given(st.integers(0, 8), st.lists(st.integers(0, 8), max_size=6), st.integers(1, 40))
def test_the_source_holds_most_of_what_can_be_reused(
    here: int, there: list[int], prompt_tokens: int
) -> None:
    others = [make_link(f"w{i}", cached=blocks) for i, blocks in enumerate(there)]
    usable = (prompt_tokens - 1) // 4
    most = max((min(blocks, usable) for blocks in there), default=0)
    found = source_of(make_link("a", cached=here), *others, prompt_tokens=prompt_tokens)
    assert (found[1] if found else None) == (most if most > min(here, usable) else None)
