from collections import Counter

import pytest

from core.ids import Role
from router.config import RouterConfig
from router.policies.base import DecodePolicy, PrefillPolicy
from router.policies.build import DECODE, PREFILL, build_policies
from router.policies.simple import (
    DecodeLeastLoad,
    DecodePowerOfTwo,
    LeastLoad,
    PowerOfTwo,
    RoundRobin,
    Uniform,
)
from tests.router.views import Workers


def fleet(role: Role = Role.PREFILL) -> Workers:
    workers = Workers(role)
    for i in range(5):
        workers.add(f"w{i}", queued=i, context=i)
    return workers


def counts(policy: PrefillPolicy, workers: Workers, times: int = 100) -> Counter[str]:
    chosen: Counter[str] = Counter()
    for _ in range(times):
        query = workers.prefill(closed=["w1"])
        decision = policy.choose(query)
        policy.placed(query, decision)
        chosen[decision.worker_id] += 1
    return chosen


def test_round_robin_takes_turns_and_passes_over_the_closed() -> None:
    assert set(counts(RoundRobin(), fleet())) == {"w0", "w2", "w3", "w4"}
    workers, policy = fleet(), RoundRobin()
    turns = []
    for _ in range(6):
        query = workers.prefill()
        turns.append(policy.choose(query).worker_id)
        policy.placed(query, policy.choose(query))
    assert turns == ["w0", "w1", "w2", "w3", "w4", "w0"]


def test_random_takes_any() -> None:
    assert set(counts(Uniform(), fleet())) == {"w0", "w2", "w3", "w4"}


def test_least_load_takes_the_shortest_queue() -> None:
    assert set(counts(LeastLoad(), fleet())) == {"w0"}


def test_least_load_takes_any_of_equals() -> None:
    workers = fleet()
    workers.add("w5")
    assert set(counts(LeastLoad(), workers)) == {"w0", "w5"}


def test_power_of_two_never_takes_the_longest_queue() -> None:
    assert set(counts(PowerOfTwo(), fleet())) == {"w0", "w2", "w3"}


@pytest.mark.parametrize("policy", [DecodeLeastLoad(), DecodePowerOfTwo()])
def test_decode_policies_take_less_context(policy: DecodePolicy) -> None:
    workers = fleet(Role.DECODE)
    chosen = {policy.choose(workers.decode()).worker_id for _ in range(60)}
    assert "w4" not in chosen
    assert "w0" in chosen


@pytest.mark.parametrize("name", sorted(PREFILL))
def test_every_prefill_policy_of_the_config_answers_an_open_worker(name: str) -> None:
    config = RouterConfig.model_validate({"prefill_policy": name})
    assert "w1" not in counts(build_policies(config).prefill, fleet())


@pytest.mark.parametrize("name", sorted(DECODE))
def test_every_decode_policy_of_the_config_answers_an_open_worker(name: str) -> None:
    policy = build_policies(RouterConfig.model_validate({"decode_policy": name})).decode
    workers = fleet(Role.DECODE)
    closed = ["w0", "w2", "w3", "w4"]
    assert policy.choose(workers.decode(closed=closed)).worker_id == "w1"
