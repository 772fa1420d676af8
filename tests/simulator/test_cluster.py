"""Requests through small clusters: times by hand, failures, start-up, stale reports."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from simulator.spec import Failure, NetworkSpec, PoolRole
from simulator.workload.types import SimRequest
from tests.simulator.clusters import WORKER, ask, colocated, pool, run, split


def test_a_request_alone_takes_what_its_steps_take() -> None:
    (record,) = run(split(), [ask()]).records
    assert record.ttft_s == pytest.approx(0.160)
    # 32 tokens of the last chunk are still to send, then the closing question; 10 steps follow.
    assert record.transfer_s == pytest.approx(32e3 / 1e9 + 0.001)
    assert record.end_s == pytest.approx(0.160 + record.transfer_s + 0.1)
    assert (record.outcome, record.attempts) == ("ok", 1)


def test_a_slow_network_delays_the_decode_and_not_the_first_token() -> None:
    slow = replace(WORKER, nic_bytes_per_s=1e6)
    (record,) = run(split(worker=slow), [ask()]).records
    assert record.ttft_s == pytest.approx(0.160)
    # The first chunk leaves at 64 ms, then the link is never idle: 160 kB at 1 kB per ms.
    assert record.transfer_s == pytest.approx(0.064 + 0.160 + 0.001 - 0.160)


def test_what_the_decode_worker_holds_is_not_sent_again() -> None:
    spec = replace(split(), router=RouterConfig(admission="off", local_prefill=False))
    requests = [ask(0.0, family=1), ask(5.0, prompt=176, family=1)]
    first, second = run(spec, requests).records
    assert second.cached_tokens == 160
    assert second.ttft_s == pytest.approx(0.016)
    assert run(spec, requests).kv_moved_bytes == 176e3
    assert first.end_s < 5.0


def test_a_prompt_nearly_cached_at_a_decode_worker_is_computed_there() -> None:
    turns = [ask(float(i), prompt=160 + 16 * i, family=1) for i in range(8)]
    records = run(split(), turns).records
    assert records[0].prefill_worker != records[0].decode_worker
    assert records[-1].prefill_worker == records[-1].decode_worker
    assert records[-1].cached_tokens == 160 + 16 * 6


def test_a_colocated_worker_computes_a_prompt_beside_its_decodes() -> None:
    first, second = run(colocated(), [ask(), ask(0.2, output=2)]).records
    # Two whole chunks of 63 tokens and one of 34, beside three tokens of the first answer; the
    # step in flight at 0.2 s has just begun.
    assert second.ttft_s == pytest.approx(0.160 + 3 * 0.01, abs=0.011)
    assert first.end_s == pytest.approx(0.160 + 10 * 0.01 + 0.160)


def test_an_answer_of_one_token_needs_no_decode_worker() -> None:
    outcome = run(split(), [ask(output=1)])
    assert outcome.records[0].end_s == pytest.approx(0.160)
    assert outcome.busy_share["decode"] == 0


@pytest.mark.parametrize("at_s", [0.05, 0.1605, 0.2])
@pytest.mark.parametrize("pool_name", ["prefill", "decode"])
def test_a_dead_worker_costs_a_pause_and_no_request(at_s: float, pool_name: str) -> None:
    spec = replace(split(2, 2), failures=(Failure(at_s=at_s, pool=pool_name, worker=0),))
    records = run(spec, [ask(output=20, family=i) for i in (1, 2, 3, 4)]).records
    assert [record.outcome for record in records] == ["ok"] * 4
    whole = run(split(2, 2), [ask(output=20, family=i) for i in (1, 2, 3, 4)]).records
    assert sum(r.end_s for r in records) >= sum(r.end_s for r in whole)


def dying(pool_name: str, *at_s: float) -> tuple[Failure, ...]:
    """The one worker of a pool dies so often, and is there again soon."""
    return tuple(Failure(at_s=s, pool=pool_name, worker=0, restart_s=0.05) for s in at_s)


def test_a_long_answer_outlives_more_workers_than_an_attempt_may_fail() -> None:
    spec = replace(split(), failures=dying("decode", 0.5, 1.5, 2.5, 3.5))
    (record,) = run(spec, [ask(output=400)]).records
    assert (record.outcome, record.attempts > 5) == ("ok", True)


def test_attempts_that_bring_no_answer_forward_are_bounded() -> None:
    spec = replace(split(), failures=dying("prefill", 0.1, 0.45, 0.8))
    (record,) = run(spec, [ask(output=400)]).records
    assert (record.outcome, record.attempts) == ("failed", 3)


def test_tokens_sent_before_a_death_are_not_sent_again() -> None:
    spec = replace(split(1, 2), failures=(Failure(at_s=0.4, pool="decode", worker=0),))
    records = run(spec, [ask(output=40, family=1), ask(output=40, family=2)]).records
    moved = [record for record in records if record.attempts == 2]
    assert moved
    for record in moved:
        assert record.ttft_s <= 0.33
        # Most of the prompt is cached, and of 39 steps those before 0.4 s are not taken again.
        steps_left = 39 - int((0.4 - record.first_s - 0.002) / 0.01)
        assert record.end_s == pytest.approx(0.4 + 0.03 + 0.01 * steps_left, abs=0.03)


def test_requests_wait_for_a_pool_that_starts_later() -> None:
    late = replace(pool(PoolRole.DECODE, 1), ready_s=3.0)
    spec = replace(split(), pools=(pool(PoolRole.PREFILL, 1), late))
    (record,) = run(spec, [ask()]).records
    assert record.outcome == "ok"
    assert 3.0 <= record.first_s < 3.6


def test_a_restarted_worker_takes_requests_again() -> None:
    spec = replace(split(), failures=(Failure(at_s=1.0, pool="prefill", worker=0, restart_s=2.0),))
    first, second = run(spec, [ask(family=1), ask(1.5, family=1)]).records
    assert first.end_s < 1.0
    assert 3.0 <= second.first_s < 3.6
    assert second.cached_tokens == 0


def test_the_same_seed_gives_the_same_run() -> None:
    requests = [ask(0.03 * i, prompt=64 + 16 * (i % 7), family=1 + i % 5) for i in range(120)]
    spec = replace(split(3, 3), report_s=0.2, routers=3, seed=7)
    assert run(spec, requests) == run(spec, requests)
    assert run(spec, requests).records != run(replace(spec, seed=8), requests).records


def test_stale_reports_lead_to_longer_queues() -> None:
    requests = [ask(0.05 * i, output=2) for i in range(300)]
    policy = RouterConfig(admission="off", prefill_policy="least_load")
    spec = replace(split(4, 4), router=policy)
    fresh = run(spec, requests).records
    stale = run(replace(spec, report_s=1.0, routers=8), requests).records
    assert sum(r.ttft_s for r in stale) > 1.2 * sum(r.ttft_s for r in fresh)


def test_admission_refuses_what_would_wait_too_long() -> None:
    requests = [ask(0.05 * i, prompt=320, output=2) for i in range(800)]
    refusing = replace(split(2, 2), router=RouterConfig())
    late = [r for r in run(refusing, requests).records if r.at_s > 20]
    assert {record.outcome for record in late} == {"ok", "refused"}
    assert max(r.ttft_s for r in late if r.outcome == "ok") < 1.5
    taking = [r for r in run(split(2, 2), requests).records if r.at_s > 20]
    assert min(record.ttft_s for record in taking) > 1.5


def test_a_prompt_too_long_for_every_worker_is_refused_and_the_rest_is_served() -> None:
    records = run(split(), [ask(), SimRequest(0.1, 10_000, 5), ask(0.2)]).records
    assert [record.outcome for record in records] == ["ok", "too_long", "ok"]


def test_two_kinds_of_workers_may_serve_one_role() -> None:
    small = replace(WORKER, kv_blocks=100)
    pools = (
        pool(PoolRole.PREFILL, 1, name="old"),
        pool(PoolRole.PREFILL, 1, small, name="new"),
        pool(PoolRole.DECODE, 2),
    )
    outcome = run(replace(split(), pools=pools), [ask(0.01 * i) for i in range(40)])
    assert set(outcome.busy_share) == {"old", "new", "decode"}
    assert min(outcome.busy_share.values()) > 0


def test_a_full_decode_worker_makes_hand_offs_wait_and_loses_none() -> None:
    spec = replace(split(1, 1, replace(WORKER, kv_blocks=40)), network=NetworkSpec(control_s=0.01))
    outcome = run(spec, [ask(0.0, prompt=320, output=60, family=i + 1) for i in range(5)])
    assert [record.outcome for record in outcome.records] == ["ok"] * 5
    assert max(record.transfer_s for record in outcome.records) > 0.2
