"""Colocated workers beside prefill and decode workers, in one cluster."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kv_transfer.config import TransferConfig
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster, Outcome
from simulator.job import Record
from simulator.spec import Failure, PoolRole, SimSpec
from simulator.workload.types import SimRequest
from tests.simulator.clusters import WORKER, ask, check_idle, pool, split
from tests.simulator.test_moves import STICKY, burst

PLAIN = RouterConfig(admission="off", local_prefill=False, prefill_policy="least_load")
LOCAL = RouterConfig(admission="off")
HERE, THERE = ("colocated", "colocated"), ("prefill", "decode")
LATE_S = 50.0


def mixed(colocated: int = 1, prefill: int = 1, decode: int = 1) -> SimSpec:
    """A pool of each role; prompts go where least is queued."""
    spec = split(prefill, decode)
    return replace(spec, pools=(pool(PoolRole.COLOCATED, colocated), *spec.pools), router=PLAIN)


def late(spec: SimSpec, role: PoolRole, ready_s: float) -> SimSpec:
    """That pool is up later than the others."""
    pools = (replace(one, ready_s=ready_s if one.role is role else 0.0) for one in spec.pools)
    return replace(spec, pools=tuple(pools))


def run(spec: SimSpec, requests: Sequence[SimRequest]) -> tuple[Outcome, Cluster]:
    cluster = Cluster(spec)
    outcome = cluster.run(requests)
    assert {record.outcome for record in outcome.records} == {"ok"}
    check_idle(cluster)
    return outcome, cluster


def pools_of(record: Record) -> tuple[str, str]:
    return record.prefill_worker.rsplit("-", 1)[0], record.decode_worker.rsplit("-", 1)[0]


def stream(count: int = 60) -> list[SimRequest]:
    return [ask(0.1 * i, output=30) for i in range(count)]


def test_a_prompt_is_answered_where_it_is_computed_or_by_a_decode_worker_as_its_worker_is() -> None:
    outcome, _ = run(mixed(), stream())
    places = Counter(pools_of(record) for record in outcome.records)
    assert set(places) == {HERE, THERE}
    assert min(places.values()) >= 10
    assert min(outcome.busy_share.values()) > 0
    here = [record for record in outcome.records if pools_of(record) == HERE]
    assert max(record.transfer_s for record in here) == 0.0


def test_a_decode_worker_may_compute_a_prompt_here_as_well() -> None:
    spec = replace(mixed(), router=LOCAL)
    turns = [ask(float(i), prompt=160 + 16 * i, family=1) for i in range(9)]
    spec = late(spec, PoolRole.COLOCATED, 6.5)  # by then a decode worker holds the session
    outcome, _ = run(spec, turns)
    assert pools_of(outcome.records[-1]) == ("decode", "decode")


def test_its_steps_are_as_long_as_they_get_whatever_the_target() -> None:
    spec, wide = late(mixed(), PoolRole.PREFILL, LATE_S), replace(WORKER, step_tokens=512)
    pools = tuple(replace(one, worker=wide) for one in spec.pools)
    spec = replace(spec, pools=pools, router=LOCAL)
    outcome, _ = run(spec, [ask(output=900), *(ask(1.0 + i, prompt=480) for i in range(8))])
    # One step, beside an answer, after the one in flight; within 95 ms there would be six.
    assert outcome.records[-1].ttft_s == pytest.approx(0.48 + 0.01, abs=0.011)


def test_what_its_steps_take_is_learned_apart_from_other_workers() -> None:
    _, cluster = run(mixed(), stream(120))
    router = cluster._routers[0]
    seconds = {}
    for link in router.fleet.links():
        speed = router.chooser._ask.known.curves.of(link.view.kind)
        seconds[link.member.pool] = speed.prefill.seconds(0, 160, 64)
        assert speed.decode_fit.observed > 5
    assert seconds["prefill"] == seconds["decode"] == pytest.approx(0.16, rel=0.02)
    # Three steps, answers in all of them.
    assert seconds["colocated"] == pytest.approx(0.16 + 3 * 0.01, rel=0.1)


@pytest.mark.parametrize("silent", [False, True])
def test_what_a_colocated_worker_ran_goes_on_when_it_dies(silent: bool) -> None:
    failure = Failure(at_s=1.5, pool="colocated", worker=0, silent=silent)
    router = PLAIN.model_copy(update={"worker_silence_s": 0.5})
    outcome, _ = run(replace(mixed(), failures=(failure,), router=router), stream(40))
    again = [record for record in outcome.records if record.attempts == 2]
    assert again
    assert {pools_of(record) for record in again} == {THERE}
    assert any(record.first_s < 1.5 for record in again)  # whose client had tokens already


@pytest.mark.parametrize("pool_name", ["prefill", "decode"])
def test_a_colocated_worker_takes_over_what_other_workers_lose(pool_name: str) -> None:
    failure = Failure(at_s=1.5, pool=pool_name, worker=0)
    outcome, _ = run(replace(mixed(), failures=(failure,)), stream(40))
    again = [record for record in outcome.records if record.attempts > 1]
    assert again
    assert {pools_of(record) for record in again} == {HERE}
    assert {pools_of(r) for r in outcome.records if r.at_s > 1.5} == {HERE}


def test_without_a_decode_worker_no_prompt_waits_at_a_prefill_worker() -> None:
    spec = late(mixed(), PoolRole.DECODE, LATE_S)
    outcome, _ = run(spec, [*stream(20), ask(LATE_S + 1), ask(LATE_S + 1)])
    *before, one, other = outcome.records
    assert {pools_of(record) for record in before} == {HERE}
    assert max(record.end_s for record in before) < LATE_S
    assert {pools_of(one), pools_of(other)} == {HERE, THERE}


def test_it_goes_on_at_the_next_life_of_its_worker_where_there_is_no_decode_worker() -> None:
    failure = Failure(at_s=0.2, pool="colocated", worker=0, restart_s=1.0)
    spec = replace(late(mixed(), PoolRole.DECODE, LATE_S), failures=(failure,))
    outcome, _ = run(spec, [ask(output=30)])
    assert pools_of(outcome.records[0]) == HERE
    assert outcome.records[0].end_s < 3.0


@pytest.mark.parametrize(
    ("last", "moves"),
    [(PoolRole.COLOCATED, True), (PoolRole.PREFILL, False)],
    ids=["to a colocated worker", "from one"],
)
def test_queued_prompts_move_to_a_colocated_worker_and_not_away_from_it(
    last: PoolRole, moves: bool
) -> None:
    """The pool that is up last holds no prefix, so the queue is at the other one."""
    spec = replace(late(mixed(), last, 1.0), router=STICKY, slo=Slo(ttft_s=1.5, tpot_s=0.1))
    outcome, _ = run(spec, burst())
    assert (outcome.prompts_moved > 0) is moves
    moved = [record for record in outcome.records if record.attempts == 2]
    assert len(moved) == outcome.prompts_moved
    assert {pools_of(record) for record in moved} <= {HERE}


def test_a_prefill_worker_fetches_a_prefix_from_a_colocated_one() -> None:
    router = PLAIN.model_copy(update={"prefill_policy": "round_robin"})
    spec = replace(late(mixed(), PoolRole.PREFILL, 3.0), router=router, transfer=TransferConfig())
    outcome, _ = run(spec, [ask(at_s, prompt=1600, family=1) for at_s in (0.0, 4.0, 5.0)])
    assert Counter(map(pools_of, outcome.records)) == {HERE: 2, THERE: 1}
    assert outcome.prefixes_fetched == 1
    assert max(record.ttft_s for record in outcome.records[1:]) < 0.1


def test_the_same_seed_gives_the_same_run() -> None:
    requests = [ask(0.03 * i, prompt=64 + 16 * (i % 7), family=1 + i % 5) for i in range(120)]
    failure = Failure(at_s=1.0, pool="colocated", worker=1, restart_s=0.5)
    spec = replace(mixed(2, 2, 2), router=LOCAL, report_s=0.2, routers=3, failures=(failure,))
    first, _ = run(spec, requests)
    assert first == run(spec, requests)[0]
    assert first.records != run(replace(spec, seed=8), requests)[0].records
