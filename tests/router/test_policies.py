from random import Random

from hypothesis import given
from hypothesis import strategies as st

from core.ids import WorkerId
from router.policies.base import DecodeCandidate, PrefillCandidate
from router.policies.cache_aware import CacheAware
from router.policies.power_of_two import PowerOfTwo
from tests.builders import QUICK


def prefill(name: str, cached: int = 0, queued: int = 0) -> PrefillCandidate:
    return PrefillCandidate(worker_id=WorkerId(name), cached_tokens=cached, queued_tokens=queued)


def decode(name: str, *, context: int = 0, sequences: int = 0, free: int = 1000) -> DecodeCandidate:
    return DecodeCandidate(
        worker_id=WorkerId(name), sequences=sequences, context_tokens=context, free_tokens=free
    )


def choose_prefill(workers: list[PrefillCandidate], weight: float = 0.1, seed: int = 0) -> str:
    return CacheAware(weight).choose(100, workers, Random(seed)).worker_id


def choose_decode(workers: list[DecodeCandidate], total: int = 100, seed: int = 0) -> str:
    return PowerOfTwo().choose(total, workers, Random(seed)).worker_id


# -- prefill ------------------------------------------------------------------------------------


def test_the_holder_of_the_prefix_wins_while_its_queue_is_short() -> None:
    assert choose_prefill([prefill("a"), prefill("b", cached=80, queued=500)]) == "b"


def test_a_long_queue_outweighs_the_cache() -> None:
    assert choose_prefill([prefill("a"), prefill("b", cached=80, queued=900)]) == "a"


def test_without_a_cache_the_shorter_queue_wins() -> None:
    assert choose_prefill([prefill("a", queued=50), prefill("b", queued=20)]) == "b"


def test_the_decision_names_every_candidate_it_looked_at() -> None:
    decision = CacheAware(0.1).choose(
        100, [prefill("a"), prefill("b", cached=80, queued=500)], Random(0)
    )
    assert decision.explain() == (
        "b of b=70.0(queued=500 uncached=20) a=100.0(queued=0 uncached=100)"
    )


def test_a_crowd_of_holders_does_not_hide_the_idle_workers() -> None:
    """With every holder's queue full, some draws find a worker without the prefix."""
    workers = [prefill(f"hot{i}", cached=100, queued=5000) for i in range(2)]
    workers += [prefill(f"idle{i}") for i in range(4)]
    chosen = {choose_prefill(workers, seed=seed) for seed in range(20)}
    assert chosen <= {f"idle{i}" for i in range(4)}
    assert len(chosen) > 1


# -- decode -------------------------------------------------------------------------------------


def test_of_two_workers_the_less_loaded_wins() -> None:
    assert choose_decode([decode("a", context=500), decode("b", context=100)]) == "b"


def test_a_worker_without_room_is_passed_over() -> None:
    for seed in range(10):
        workers = [decode("full", free=99), decode("busy", context=900, free=100)]
        assert choose_decode(workers, seed=seed) == "busy"


def test_when_nobody_has_room_somebody_is_chosen_all_the_same() -> None:
    assert choose_decode([decode("a", free=1), decode("b", free=2, context=9)]) == "a"


def test_the_most_loaded_of_many_is_never_chosen() -> None:
    workers = [decode(str(i), context=i) for i in range(5)]
    chosen = {choose_decode(workers, seed=seed) for seed in range(50)}
    assert chosen == {"0", "1", "2", "3"}


# -- both ---------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 9999)), min_size=1, max_size=9))
def test_the_choice_is_the_cheapest_of_those_looked_at(loads: list[tuple[int, int]]) -> None:
    workers = [prefill(str(i), cached, queued) for i, (cached, queued) in enumerate(loads)]
    decision = CacheAware(0.1).choose(100, workers, Random(0))
    assert decision.worker_id in {worker.worker_id for worker in workers}
    cost = {scored.worker_id: scored.cost for scored in decision.candidates}
    assert cost[decision.worker_id] == min(cost.values())


@QUICK
@given(st.integers(1, 9), st.integers(0, 1000))
def test_equal_seeds_choose_equally(count: int, seed: int) -> None:
    workers = [decode(str(i)) for i in range(count)]
    assert choose_decode(workers, seed=seed) == choose_decode(workers, seed=seed)
