"""What the queries answer about a fleet's views, and who else holds a prompt's prefix."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import BlockHash, Incarnation, Role, WorkerId
from core.messages import PrefixSource
from router.coming import steps_of
from router.curves import PrefillCurve
from router.place import Beside, DecodeCacheQuery
from router.policies.base import Decision, Scored
from tests.builders import QUICK
from tests.router.views import BLOCK, CHAIN, IDLE, Workers

A = WorkerId("a")


def test_a_queue_is_what_was_reported_and_what_was_sent_since() -> None:
    workers = Workers()
    workers.add("a", queued=30, waiting=2, running=3).submitted(2, 500, 100)
    query = workers.prefill()
    assert (query.queued_tokens(A), query.ttft_s(A)[0], query.sequences(A)) == (130, 130.0, 6)


def test_a_prompts_own_work_is_what_is_not_cached_there() -> None:
    workers = Workers()
    workers.add("a", cached=3)
    query = workers.prefill(tokens=32)
    assert (query.cached_tokens(A), query.ttft_s(A)) == (12, (0.0, 20.0))


def test_the_last_token_is_always_computed() -> None:
    workers = Workers()
    workers.add("a", cached=8)
    assert workers.prefill(tokens=32).cached_tokens(A) == 31


def test_what_is_cached_is_the_same_before_and_after_the_holders_were_asked() -> None:
    workers = Workers()
    for name, cached in (("a", 2), ("b", 7), ("c", 0)):
        workers.add(name, cached=cached)
    before, after = workers.prefill(), workers.prefill()
    assert after.holders(1) == ["b"]
    for query in (before, after):
        assert [query.cached_tokens(w) for w in query.pool] == [8, 28, 0]


def test_a_closed_worker_is_no_holder() -> None:
    workers = Workers()
    workers.add("a", cached=5)
    workers.add("b", cached=2)
    assert workers.prefill(closed=["a"]).holders(4) == ["b"]


def test_a_holder_that_has_left_is_no_holder() -> None:
    workers = Workers()
    workers.add("a", cached=5)
    pool = workers.pool
    assert workers.prefill(pool=pool).holders(4) == ["a"]
    workers.views[A].holdings.leave()
    assert workers.prefill(pool=pool).holders(4) == []


def test_a_decision_explains_itself_in_one_line() -> None:
    decision = Decision(A, [Scored(A, 1.5, (("queue_s", 5.0), ("work_s", 1.0)))], "cost")
    assert decision.explain() == "a by cost: a=1.5(queue_s=5 work_s=1)"


# -- decode -------------------------------------------------------------------------------------


def test_decode_load_counts_own_submits_the_worker_has_not_reported() -> None:
    workers = Workers()
    workers.add("a", running=5, context=500, free_blocks=10).submitted(2, 15, 0)
    query = workers.decode()
    assert (query.sequences(A), query.context_tokens(A), query.free_tokens(A)) == (6, 515, 25)


def test_before_any_answer_has_ended_the_worst_case_must_fit() -> None:
    workers = Workers()
    workers.add("a", free_blocks=5)
    assert workers.decode(max_tokens=20).fits(A)
    assert not workers.decode(max_tokens=21).fits(A)


def test_with_short_answers_known_more_fits_than_the_worst_case() -> None:
    workers = Workers()
    workers.add("a", running=1, context=20, free_blocks=95)
    assert not workers.decode(max_tokens=1000).fits(A)
    for _ in range(16):
        workers.known.curves.saw_output(8)
    assert workers.decode(max_tokens=1000).fits(A)


def test_a_peak_yet_to_come_counts_although_there_is_room_now() -> None:
    workers = Workers()
    workers.add("a", running=3, context=40, free_blocks=90)
    for _ in range(16):
        workers.known.curves.saw_output(400)
    assert not workers.decode(max_tokens=20).fits(A)


def test_near_workers_are_those_of_the_kvs_host_if_there_are_others() -> None:
    workers = Workers()
    workers.add("a", host="h1")
    workers.add("b", host="h2")
    assert workers.decode(kv_address="h1:77").near == ("a",)
    assert workers.decode(kv_address="h3:77").near == ()
    del workers.views[WorkerId("b")]
    assert workers.decode(kv_address="h1:77").near == ()


def test_a_label_is_the_network_domain_where_there_is_one() -> None:
    workers = Workers()
    workers.add("a", host="h1", domain="rack-1")
    workers.add("b", host="h2", domain="rack-1")
    workers.add("c", host="h3")
    assert workers.decode(kv_address="h1:1").near == ("a", "b")
    assert workers.decode(kv_address="h3:1").near == ("c",)


# -- who else has the prefix --------------------------------------------------------------------


def source_of(
    workers: Workers, prompt_tokens: int = 32, failed: tuple[str, ...] = ()
) -> tuple[str, int] | None:
    """Worker and blocks of the source, when `a` is chosen."""
    query = workers.prefill(prompt_tokens)
    source = query.source(A, workers.pool, tuple(map(Incarnation, failed)))
    return (source.worker_id, source.num_blocks) if source else None


def fleet(**cached: int) -> Workers:
    workers = Workers()
    for name, blocks in cached.items():
        workers.add(name, cached=blocks)
    return workers


def beside_a(workers: Workers) -> Beside:
    query = DecodeCacheQuery(workers.pool, workers.known, 0.0, tokens=33, hashes=CHAIN)
    return query.beside(A)


def test_what_leases_keep_is_no_room_for_answers_to_grow() -> None:
    workers = Workers(Role.DECODE)
    for _ in range(8):
        workers.known.curves.saw_output(60)
    workers.add("a", running=20, context=100, free_blocks=75)
    workers.add("b", running=20, context=100, free_blocks=20)
    query = workers.decode(tokens=20, max_tokens=80)
    assert query.fits(A)
    assert not query.fits(WorkerId("b"))
    # 80 tokens are free and 280 leased; with a prompt of 70 there will be 150 at the peak
    workers.add("c", running=5, context=40, free_blocks=20)
    assert not workers.decode(tokens=70, max_tokens=130).fits(WorkerId("c"))


def test_a_hand_off_not_yet_reported_is_no_prefill_to_wait_for_at_a_decode_worker() -> None:
    workers = Workers(Role.DECODE)
    view = workers.add("a", queued=7)
    before = beside_a(workers)
    view.submitted(1, 500, 0)
    after = beside_a(workers)
    assert workers.prefill().queued_tokens(A) == 7
    assert before.queue_s == pytest.approx(7.0)
    assert after.queue_s == pytest.approx(7.0, rel=1e-3), "but for an answer in its step"


def test_prompts_at_one_decode_worker_add_up_before_a_report_shows_them() -> None:
    workers = Workers(Role.DECODE)
    view = workers.add("a", cached=2, queued=30, running=1, step_tokens=10)
    work_s, steps = 25.0, 3  # of 33 tokens 8 are cached
    for number, tokens in enumerate((30, 50, 70)):
        there = beside_a(workers)
        assert there.chunk_steps == tokens / 10 + steps
        assert there.delay_s == pytest.approx(tokens + work_s)
        assert there.queue_s == pytest.approx(tokens + tokens / 10 * there.decode_s)
        assert there.work_s == pytest.approx(work_s + steps * there.decode_s)
        view.submitted(number + 1, 20, 20)


@pytest.mark.parametrize(
    ("queued", "waiting", "step"),
    [(30, 3, 40), (31, 3, 10), (400, 0, 10)],
    ids=["short prompts", "one is long", "nobody knows how many"],
)
def test_short_prompts_that_wait_share_steps_and_long_ones_take_their_chunks(
    queued: int, waiting: int, step: int
) -> None:
    workers = Workers(Role.DECODE)
    view = workers.add("a", queued=queued, waiting=waiting, running=0)
    view.hello = replace(view.hello, step_tokens=40, chunk_tokens=10)
    assert view.queue_step_tokens == step
    view.load = None
    assert view.queue_step_tokens == 10


def test_a_step_with_a_chunk_takes_what_decodes_were_seen_to_add_to_one() -> None:
    workers = Workers(Role.DECODE)
    view = workers.add("a", running=1)
    before = beside_a(workers)
    for _ in range(200):
        workers.known.curves.saw_beside(view.kind, 0.4, 0.1)
    after = beside_a(workers)
    saved_s = 0.75 * after.decode_s
    assert after.work_s == pytest.approx(before.work_s - saved_s, rel=1e-6)
    assert after.delay_s == pytest.approx(before.delay_s - saved_s, rel=1e-6)


def test_chunks_beside_answers_are_as_long_as_decode_workers_make_them() -> None:
    workers = Workers(Role.DECODE)
    view = workers.add("a", queued=6400, running=1)
    workers.known.curves.set_prefill(view.kind, PrefillCurve(0.002, 1e-4, 0.0))

    def beside(step_s: float | None) -> Beside:
        known = replace(workers.known, step_s=step_s)
        return DecodeCacheQuery(workers.pool, known, 0.0, tokens=6401, hashes=()).beside(A)

    free = beside(None)
    bound = beside(free.decode_s + 0.002 + 128 * 1e-4)
    assert free.chunk_steps == 13 + 6400 / 512
    assert bound.chunk_steps == 51 + 6400 / 128
    more_s = (bound.chunk_steps - free.chunk_steps) * (0.002 + free.decode_s)
    assert bound.first_token_s == pytest.approx(free.first_token_s + more_s)
    view.load = IDLE
    assert beside(0.001).chunk_steps == 13, "nobody decodes there"


def test_the_source_is_the_longest_holder() -> None:
    assert source_of(fleet(a=2, p=3, d=5)) == ("d", 5)


def test_a_source_says_where_and_which_life_it_is() -> None:
    workers = fleet(a=0)
    workers.add("p", cached=3, host="far")
    assert workers.prefill().source(A, workers.pool, ()) == PrefixSource(
        worker_id=WorkerId("p"), address="far:1", incarnation=Incarnation("p"), num_blocks=3
    )


def test_nobody_is_a_source_who_holds_no_more_than_the_chosen_one() -> None:
    assert source_of(fleet(a=4, p=4)) is None


def test_nobody_is_a_source_on_whom_the_request_has_failed() -> None:
    assert source_of(fleet(a=0, p=4, q=2), failed=("p",)) == ("q", 2)


def test_the_block_of_the_last_token_counts_for_nobody() -> None:
    assert source_of(fleet(a=7, p=8)) is None
    assert source_of(fleet(a=6, p=8)) == ("p", 7)
    assert source_of(fleet(a=0, p=8), prompt_tokens=4) is None


def test_of_equal_holders_the_least_busy_is_read_from_then_the_first_by_name() -> None:
    workers = fleet(a=0)
    workers.add("b", cached=5, running=9)
    workers.add("d", cached=5)
    workers.add("c", cached=5)
    assert source_of(workers) == ("c", 5)


def test_a_longer_holder_is_the_source_however_busy_it_is() -> None:
    workers = fleet(a=0, c=5)
    workers.add("b", cached=6, running=900)
    assert source_of(workers) == ("b", 6)


@QUICK
@given(st.integers(0, 8), st.lists(st.integers(0, 8), max_size=6), st.integers(1, 40))
def test_the_source_holds_most_of_what_can_be_reused(
    here: int, there: list[int], prompt_tokens: int
) -> None:
    workers = fleet(a=here, **{f"w{i}": blocks for i, blocks in enumerate(there)})
    usable = min((prompt_tokens - 1) // BLOCK, len(CHAIN))
    most = max((min(blocks, usable) for blocks in there), default=0)
    found = source_of(workers, prompt_tokens)
    assert (found[1] if found else None) == (most if most > min(here, usable) else None)


def test_of_equal_holders_one_in_the_same_network_domain_is_read_from() -> None:
    workers = Workers()
    workers.add("a", domain="rack-1")
    workers.add("b", cached=5)
    workers.add("c", cached=5, running=9, domain="rack-1")
    assert source_of(workers) == ("c", 5)


# -- what is on its way -------------------------------------------------------------------------


def test_what_a_prompt_on_its_way_will_leave_counts_as_cached_where_it_went() -> None:
    hashes = [BlockHash(i.to_bytes(16)) for i in range(300)]
    workers = Workers()
    workers.add("a")
    workers.add("b")
    workers.known.coming.add(A, steps_of(hashes[:150], BLOCK))
    query = workers.prefill(1200, hashes)
    assert (query.expected_s(A)[1], query.expected_s(WorkerId("b"))[1]) == (1200 - 512, 1200)
    assert (query.cached_tokens(A), query.ttft_s(A)[1]) == (0, 1200)
    assert query.coming(4) == ["a"]
    assert workers.prefill(1200, hashes, closed=["a"]).coming(4) == []
