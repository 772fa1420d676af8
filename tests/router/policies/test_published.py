"""The published policies: what tells each from the others. A second per token."""

from router.policies.base import PrefillPolicy, Slo
from router.policies.dualmap import DualMap
from router.policies.dynamo_cost import DynamoCost
from router.policies.mooncake_ttft import MooncakeTtft
from router.policies.preble import Preble
from router.policies.prefix_affinity import PrefixAffinity
from tests.router.views import CHAIN, Workers


def fleet(**loads: tuple[int, int, int]) -> Workers:
    """Cached blocks, queued tokens and waiting requests by name."""
    workers = Workers()
    for name, (cached, queued, waiting) in loads.items():
        workers.add(name, cached=cached, queued=queued, waiting=waiting)
    return workers


def choose(policy: PrefillPolicy, workers: Workers, *closed: str) -> tuple[str, str]:
    decision = policy.choose(workers.prefill(closed=closed))
    return decision.worker_id, decision.rule


# -- SGLang's gateway ---------------------------------------------------------------------------


def test_affinity_follows_a_match_above_the_threshold_however_long_the_queue() -> None:
    workers = fleet(a=(0, 0, 0), b=(3, 99_999, 60))
    assert choose(PrefixAffinity(), workers) == ("b", "matched")


def test_affinity_takes_the_fewest_requests_below_the_threshold() -> None:
    workers = fleet(a=(0, 0, 3), b=(2, 0, 4))
    assert choose(PrefixAffinity(), workers) == ("a", "not matched")


def test_affinity_ends_where_the_loads_are_out_of_balance() -> None:
    assert choose(PrefixAffinity(), fleet(a=(0, 0, 0), b=(8, 0, 65))) == ("a", "unbalanced")
    assert choose(PrefixAffinity(), fleet(a=(0, 0, 200), b=(8, 0, 265))) == ("b", "matched")


# -- Dynamo, Mooncake ---------------------------------------------------------------------------


def test_dynamo_weighs_queued_and_uncached_blocks_alike() -> None:
    assert choose(DynamoCost(), fleet(a=(0, 0, 0), b=(8, 31, 1)))[0] == "b"
    assert choose(DynamoCost(), fleet(a=(0, 0, 0), b=(8, 33, 1)))[0] == "a"


def test_mooncake_takes_the_least_ttft_of_all() -> None:
    workers = fleet(a=(0, 10, 1), b=(8, 30, 1), c=(4, 14, 1))
    decision = MooncakeTtft().choose(workers.prefill())
    assert decision.worker_id == "c"
    assert {s.worker_id: s.cost for s in decision.candidates} == {"a": 43, "b": 31, "c": 31}


def test_closed_workers_are_not_looked_at() -> None:
    workers = fleet(a=(0, 10, 1), b=(8, 30, 1), c=(4, 14, 1))
    for policy in (DynamoCost(), MooncakeTtft(), PrefixAffinity(), Preble()):
        assert choose(policy, workers, "a", "b")[0] == "c"


# -- DualMap ------------------------------------------------------------------------------------


def test_dualmap_looks_at_its_two_homes_only() -> None:
    workers = Workers()
    for i in range(20):
        workers.add(f"w{i}", queued=100)
    homes = DualMap().candidates_of(workers.prefill())
    holder = next(w for w in workers.views if w not in homes)
    workers.add(holder, cached=8)
    assert choose(DualMap(), workers)[0] in homes


def test_dualmap_prefers_the_longer_prefix_until_it_breaks_the_target() -> None:
    workers = Workers(slo=Slo(ttft_s=40.0, tpot_s=1.0))
    workers.add("a", cached=8, queued=39)
    workers.add("b")
    assert choose(DualMap(), workers) == ("a", "cached")
    workers.add("a", cached=8, queued=40)
    assert choose(DualMap(), workers) == ("b", "ttft")


# -- Preble -------------------------------------------------------------------------------------


def test_preble_exploits_what_is_mostly_cached_and_explores_what_is_not() -> None:
    assert choose(Preble(), fleet(a=(0, 0, 0), b=(5, 0, 0))) == ("b", "exploit")
    assert choose(Preble(), fleet(a=(0, 0, 0), b=(4, 0, 0))) == ("b", "explore")


def test_preble_explores_where_least_was_placed_in_the_last_minutes() -> None:
    workers, policy = fleet(a=(0, 0, 0), b=(0, 0, 0)), Preble()
    turns = []
    for i in range(6):
        query = workers.prefill(now_s=i / 10)
        decision = policy.choose(query)
        policy.placed(query, decision)
        turns.append(decision.worker_id)
    assert all(turns[i] != turns[i + 1] for i in (0, 2, 4))
    late = workers.prefill(now_s=500.0)
    policy.placed(late, policy.choose(late))
    loads = {s.worker_id: s.cost for s in policy.choose(late).candidates}
    assert sorted(loads.values()) == [33.0, 66.0]


def test_preble_forgets_a_worker_with_its_last_prompt_in_the_window() -> None:
    workers, policy = fleet(a=(0, 0, 0)), Preble()
    first = workers.prefill()
    policy.placed(first, policy.choose(first))
    policy.placed(first, policy.choose(first))
    later = fleet(b=(0, 0, 0)).prefill(now_s=181.0)
    policy.placed(later, policy.choose(later))
    assert list(policy._load_s) == ["b"]
    assert list(policy._prompts) == ["b"]


def test_preble_redirects_from_the_most_to_the_least_loaded() -> None:
    workers, policy = fleet(a=(8, 0, 0), b=(0, 0, 0)), Preble()
    for i in range(101):
        query = workers.prefill(now_s=i / 10)
        decision = policy.choose(query)
        policy.placed(query, decision)
        assert (decision.worker_id, decision.rule) == (
            ("a", "exploit") if i < 100 else ("b", "exploit, redirected")
        )


def test_an_unknown_prompt_is_no_match_for_anybody() -> None:
    workers = fleet(a=(0, 0, 0))
    for policy in (PrefixAffinity(), Preble(), DualMap(), DynamoCost(), MooncakeTtft()):
        assert policy.choose(workers.prefill(tokens=3, hashes=CHAIN[:0])).worker_id == "a"
