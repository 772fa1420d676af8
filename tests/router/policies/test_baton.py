"""Baton's prefill rule: a second per token, so costs are in tokens too."""

from hypothesis import given
from hypothesis import strategies as st

from core.ids import WorkerId
from router.curves import PrefillCurve
from router.policies.base import Slo
from router.policies.baton import Baton
from tests.builders import QUICK
from tests.router.views import CHAIN, Workers


def choose(workers: Workers, weight: float = 0.1) -> str:
    return Baton(weight).choose(workers.prefill()).worker_id


def test_the_holder_of_the_prefix_wins_while_its_queue_is_short() -> None:
    workers = Workers()
    workers.add("a")
    workers.add("b", cached=8, queued=300)
    assert choose(workers) == "b"


def test_a_long_queue_outweighs_the_cache() -> None:
    workers = Workers()
    workers.add("a")
    workers.add("b", cached=8, queued=330)
    assert choose(workers) == "a"


def test_a_slow_worker_takes_what_would_wait_longer_for_a_fast_one() -> None:
    """33 tokens: 99 s on `slow`, and after its queue 33 s on `fast`."""
    for queued, chosen in ((60, "fast"), (70, "slow")):
        workers = Workers()
        workers.add("fast", queued=queued)
        workers.add("slow", times_slower=3.0)
        assert choose(workers) == chosen


def test_a_slow_worker_keeps_its_cache_as_a_fast_one_would() -> None:
    """1 of 33 tokens is not cached on `slow`: 0.1 * (queue + 3) + 0.9 * 1 against 33."""
    for queued, chosen in ((100, "slow"), (110, "fast")):
        workers = Workers()
        workers.add("fast")
        workers.add("slow", cached=8, queued=queued, times_slower=3.0)
        assert choose(workers) == chosen


def test_devices_that_turn_out_equally_fast_are_chosen_as_equal_ones() -> None:
    workers = Workers()
    workers.add("a", times_slower=3.0)
    kind = workers.add("b", cached=8, queued=300).kind
    workers.known.curves.set_prefill(kind, PrefillCurve(0.0, 3.0, 0.0))
    decision = Baton(0.1).choose(workers.prefill())
    assert {len(candidate.terms) for candidate in decision.candidates} == {2}
    assert decision.worker_id == "b"


def guarded(ttft_s: float, **loads: tuple[int, int]) -> tuple[str, str]:
    """Choice and rule under a target; cached blocks and queued tokens by name, 33 tokens asked."""
    workers = Workers(slo=Slo(ttft_s=ttft_s, tpot_s=1.0))
    for name, (cached, queued) in loads.items():
        workers.add(name, cached=cached, queued=queued)
    decision = Baton(0.1).choose(workers.prefill())
    return decision.worker_id, decision.rule


def test_an_idle_worker_that_keeps_the_target_outweighs_the_cost() -> None:
    """`b` costs 1 + 0.1 * 50 = 6, but would take 51 s."""
    assert guarded(60.0, a=(0, 0), b=(8, 50)) == ("b", "cost")
    assert guarded(40.0, a=(0, 0), b=(8, 50)) == ("a", "target")


def test_a_busy_worker_that_keeps_the_target_does_not() -> None:
    assert guarded(40.0, a=(0, 1), b=(8, 50)) == ("b", "cost, beyond the target")


def test_an_idle_worker_that_breaks_the_target_does_not() -> None:
    assert guarded(30.0, a=(0, 0), b=(8, 50)) == ("b", "cost, beyond the target")


def test_a_few_workers_are_looked_at_however_many_there_are() -> None:
    workers = Workers()
    for i in range(200):
        workers.add(f"w{i}", cached=i % 9)
    policy = Baton(0.1)
    query = workers.prefill()
    candidates = policy.candidates_of(query)
    assert 4 <= len(candidates) <= 8
    assert sum(query.cached_tokens(w) == 32 for w in candidates) >= 4
    decision = policy.choose(workers.prefill())
    assert len(decision.candidates) <= 8
    assert decision.worker_id in {candidate.worker_id for candidate in decision.candidates}


def test_a_prompt_that_is_cached_nowhere_has_more_looks() -> None:
    workers = Workers()
    for i in range(200):
        workers.add(f"w{i}")
    assert len(Baton(0.1).candidates_of(workers.prefill())) in {5, 6}
    workers.add("holder", cached=5)
    assert len(Baton(0.1).candidates_of(workers.prefill())) in {4, 5}


def test_prompts_of_one_key_have_the_same_two_homes() -> None:
    workers = Workers()
    for i in range(50):
        workers.add(f"w{i}")
    policy = Baton(0.1)
    homes = {tuple(policy.candidates_of(workers.prefill())[:2]) for _ in range(10)}
    assert len(homes) == 1


def test_a_crowd_of_holders_does_not_hide_the_idle_workers() -> None:
    chosen = set()
    for seed in range(20):
        workers = Workers(seed=seed)
        for i in range(4):
            workers.add(f"hot{i}", cached=8, queued=5000)
        for i in range(4):
            workers.add(f"idle{i}")
        chosen.add(choose(workers))
    assert chosen <= {f"idle{i}" for i in range(4)}


def test_a_prompt_without_a_full_block_goes_to_a_short_queue() -> None:
    workers = Workers()
    workers.add("a", queued=50)
    workers.add("b", queued=20)
    assert Baton(0.1).choose(workers.prefill(tokens=3, hashes=())).worker_id == "b"


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 9999)), min_size=2, max_size=9),
    st.integers(0, 8),
)
def test_the_choice_is_open_and_the_cheapest_of_those_looked_at(
    loads: list[tuple[int, int]], closed: int
) -> None:
    workers = Workers()
    for i, (cached, queued) in enumerate(loads):
        workers.add(str(i), cached=cached, queued=queued)
    shut = str(closed % len(loads))
    decision = Baton(0.1).choose(workers.prefill(closed=[shut]))
    cost = {scored.worker_id: scored.cost for scored in decision.candidates}
    assert WorkerId(shut) not in cost
    assert cost[decision.worker_id] == min(cost.values())


def test_choosing_changes_nothing() -> None:
    workers = Workers()
    for i in range(9):
        workers.add(f"w{i}")
    policy, asked = Baton(0.1), Baton(0.1)
    for i in range(100):
        asked.choose(workers.prefill(now_s=i / 10))
    first = policy.candidates_of(workers.prefill(hashes=CHAIN))[:2]
    assert asked.candidates_of(workers.prefill(hashes=CHAIN))[:2] == first


def after_placing(prompts: int, queued_elsewhere: int) -> str:
    """The choice after so many prompts, where `holder` has the whole prefix and 100 s queued."""
    workers = Workers()
    workers.add("holder", cached=8, queued=100)
    for i in range(20):
        workers.add(f"w{i}", queued=queued_elsewhere)
    policy = Baton(0.05)
    for _ in range(prompts):
        query = workers.prefill()
        policy.placed(query, policy.choose(query))
    return policy.choose(workers.prefill()).worker_id


def test_a_prompt_waits_for_its_cache_where_all_others_are_busy() -> None:
    """0.05 * 100 + 1 at the holder, 0.05 * 200 + 33 elsewhere."""
    assert after_placing(300, queued_elsewhere=200) == "holder"


def test_a_prompt_goes_where_it_is_sooner_while_most_are_idle() -> None:
    """100 w + 1 at the holder, 33 elsewhere; w grows to nearly 1 as idle workers are seen."""
    assert after_placing(0, queued_elsewhere=0) == "holder"
    assert after_placing(300, queued_elsewhere=0) != "holder"
