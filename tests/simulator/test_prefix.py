"""Prefixes fetched from other workers' caches, where production's rule says that it pays."""

from dataclasses import replace

import pytest

from engine.config import TimedConfig
from engine.latency.base import StepShape
from engine.latency.fitted import FittedLatency
from kv_transfer.config import TransferConfig
from router.config import RouterConfig
from simulator.cluster import Cluster, Outcome
from simulator.prefix import fitted_cost
from simulator.spec import Cut, SimSpec
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest
from tests.simulator.clusters import WORKER, ask, check_idle, split

ANYWHERE = RouterConfig(admission="off", local_prefill=False, prefill_policy="round_robin")


def spec_of(*, fetch: bool = True, worker: WorkerSpec = WORKER, prefill: int = 2) -> SimSpec:
    transfer = TransferConfig(fetch=fetch)
    return replace(split(prefill, 1, worker), router=ANYWHERE, transfer=transfer)


def finished(spec: SimSpec, requests: list[SimRequest]) -> Outcome:
    cluster = Cluster(spec)
    outcome = cluster.run(requests)
    check_idle(cluster)
    for table in cluster._leases:
        table.check()
    return outcome


def again(count: int = 1, gap_s: float = 0.01) -> list[SimRequest]:
    """A prompt, and others that begin with it, soon after one another."""
    return [ask(family=1)] + [ask(5.0 + gap_s * i, prompt=176, family=1) for i in range(count)]


def test_a_prefix_that_another_worker_has_is_read_instead_of_computed() -> None:
    without, fetching = finished(spec_of(fetch=False), again()), finished(spec_of(), again())
    assert fetching.prefixes_fetched == 1
    assert fetching.fetched_tokens == 160
    assert fetching.records[1].cached_tokens == 160
    assert fetching.records[1].prefill_worker != fetching.records[0].prefill_worker
    assert without.records[1].cached_tokens == without.prefixes_fetched == 0
    # 16 tokens are left to compute, after two control messages and 160 kB over 1 GB/s.
    assert fetching.records[1].ttft_s == pytest.approx(0.016 + 2e-3 + 160e3 / 1e9)
    assert without.records[1].ttft_s == pytest.approx(0.176)


def test_over_a_slow_link_fetches_stop_once_one_was_measured() -> None:
    slow = replace(WORKER, nic_bytes_per_s=2e5)
    prompts = [ask(float(i // 2 * 20 + 5 * (i % 2)), family=1 + i // 2) for i in range(8)]
    outcome = finished(spec_of(worker=slow, prefill=2), prompts)
    assert outcome.prefixes_fetched <= 1
    assert all(record.outcome == "ok" for record in outcome.records)


def test_prompts_that_want_the_same_share_one_fetch() -> None:
    cluster = Cluster(spec_of(prefill=3))
    # Of twelve at once each worker has four; two workers do not have the prefix.
    outcome = cluster.run(again(12, gap_s=0.0))
    check_idle(cluster)
    assert outcome.prefixes_fetched == 2
    assert cluster._fetches.shared > 0
    assert all(record.cached_tokens == 160 for record in outcome.records[1:])


def test_a_fetch_that_is_cut_off_costs_a_bounded_pause() -> None:
    cuts = (Cut(at_s=5.0005, pool="prefill", worker=0, for_s=60.0),)
    # The source may be the decode worker, too: cut both off.
    cuts += (Cut(at_s=5.0005, pool="decode", worker=0, for_s=1.0),)
    outcome = finished(replace(spec_of(), cuts=cuts), again())
    assert outcome.prefixes_fetched == 0
    assert outcome.records[1].outcome == "ok"
    assert 0.176 < outcome.records[1].ttft_s < 1.0


def test_a_decode_workers_blocks_can_be_read_after_its_answer() -> None:
    spec = spec_of(prefill=2)
    few = replace(WORKER, kv_blocks=12)
    spec = replace(spec, pools=(replace(spec.pools[0], worker=few), spec.pools[1]))
    # Both prefill workers have computed other prompts since, and hold the first one no more.
    others = [ask(1.0 + i, family=2 + i) for i in range(4)]
    outcome = finished(spec, [ask(family=1), *others, ask(9.0, prompt=176, family=1)])
    assert outcome.prefixes_fetched == 1
    assert outcome.records[-1].cached_tokens == 160


def test_the_same_seed_fetches_the_same() -> None:
    first, second = finished(spec_of(prefill=3), again(9)), finished(spec_of(prefill=3), again(9))
    assert first == second


def test_the_fitted_cost_is_that_of_the_workers_model() -> None:
    worker = replace(WORKER, latency=FittedLatency.of(TimedConfig()), step_tokens=512)
    cost = fitted_cost(worker)
    for start, end in ((0, 32), (0, 512), (8_192, 8_704), (30_000, 30_512)):
        seconds = worker.latency.step_s(StepShape([(start, end)]))
        assert cost.predict_s(start, end) == pytest.approx(seconds, rel=0.03)
