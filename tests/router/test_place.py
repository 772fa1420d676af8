"""From a fleet's views to a placement: what the candidates' numbers are made of."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from core.ids import BlockHash, Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LoadReport, WorkerHello
from core.registry import WorkerRecord
from router.client import WorkerLink
from router.place import place_decode, place_prefill
from router.policies.base import Decision, DecodeCandidate, PrefillCandidate
from router.view import WorkerView

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
            peer_address="",
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
