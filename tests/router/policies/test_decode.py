"""Decode workers of one kind: by the prior, more context and sequences take longer."""

from core.ids import Role
from router.policies.base import Slo
from router.policies.decode import BatonDecode
from tests.router.views import Workers


def fleet(**context: int) -> Workers:
    workers = Workers(Role.DECODE)
    for name, tokens in context.items():
        workers.add(name, context=tokens, running=1)
    return workers


def choices(workers: Workers, times: int = 50, **query: str) -> set[str]:
    policy = BatonDecode()
    return {str(policy.choose(workers.decode(**query)).worker_id) for _ in range(times)}


def test_of_two_workers_the_faster_wins() -> None:
    assert choices(fleet(a=50_000, b=100)) == {"b"}


def test_a_worker_without_room_is_passed_over() -> None:
    workers = fleet(busy=90_000)
    workers.add("full", free_blocks=1)
    assert choices(workers) == {"busy"}


def test_when_nobody_has_room_the_one_with_most_is_taken() -> None:
    workers = Workers(Role.DECODE)
    workers.add("a", free_blocks=1)
    workers.add("b", free_blocks=2)
    assert choices(workers) == {"b"}


def test_the_slowest_of_many_is_never_chosen() -> None:
    workers = fleet(a=0, b=10_000, c=20_000, d=30_000, e=40_000)
    assert choices(workers, 200) == {"a", "b", "c", "d"}


def test_a_closed_worker_is_not_chosen() -> None:
    workers, policy = fleet(a=0, b=90_000), BatonDecode()
    assert policy.choose(workers.decode(closed=["a"])).worker_id == "b"


def test_the_kvs_own_host_comes_first() -> None:
    workers = fleet(a=0, b=0)
    workers.add("near", context=50_000, running=9, host="kv")
    assert choices(workers, kv_address="kv:5") == {"near"}


def test_the_kvs_own_host_comes_no_more_first_when_it_breaks_the_target() -> None:
    workers = Workers(Role.DECODE, slo=Slo(ttft_s=1.0, tpot_s=0.008))
    workers.add("near", context=100_000, running=9, host="kv")
    workers.add("far")
    assert choices(workers, kv_address="kv:5") == {"far"}
