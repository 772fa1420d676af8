"""Leases under the virtual clock: expiry is the backstop where nobody can say that it is over."""

from dataclasses import replace

import pytest

from kv_transfer.config import TransferConfig
from kv_transfer.metrics import LeaseEnd
from router.config import RouterConfig
from simulator.cluster import Cluster, Outcome
from simulator.spec import Cut, Failure, SimSpec
from tests.simulator.clusters import WORKER, ask, check_idle, split

SLOW = replace(WORKER, nic_bytes_per_s=1e5)
"""A prompt of 160 tokens takes 1.6 s to cross."""
PLAIN = RouterConfig(admission="off", local_prefill=False)


def spec_of(*, lease_s: float = 2.0, decode: int = 2, router: RouterConfig = PLAIN) -> SimSpec:
    transfer = TransferConfig(fetch=False, lease_s=lease_s)
    return replace(split(1, decode, SLOW), router=router, transfer=transfer)


def finished(spec: SimSpec, count: int = 1) -> Outcome:
    cluster = Cluster(spec)
    outcome = cluster.run([ask(0.001 * i, family=i + 1) for i in range(count)])
    check_idle(cluster)
    for table in cluster._leases:
        table.check()
    return outcome


def counts(outcome: Outcome) -> tuple[int, int, int, int]:
    leases = outcome.leases
    ended = (leases.ended[how] for how in (LeaseEnd.CLOSED, LeaseEnd.ABORTED, LeaseEnd.EXPIRED))
    return leases.opened, *ended


def test_a_lease_that_is_read_is_closed_however_long_that_takes() -> None:
    outcome = finished(spec_of(lease_s=0.3))
    assert outcome.records[0].transfer_s > 1.0
    assert counts(outcome) == (1, 1, 0, 0)


def test_an_answer_that_ends_with_its_first_token_leaves_no_lease_to_read() -> None:
    cluster = Cluster(spec_of())
    outcome = cluster.run([replace(ask(), output_tokens=1)])
    assert outcome.leases.ended[LeaseEnd.EXPIRED] == 0
    assert outcome.leases.opened == outcome.leases.ended.total()
    check_idle(cluster)


def first_decode_worker() -> int:
    return int(finished(spec_of()).records[0].decode_worker.rpartition("-")[2])


@pytest.mark.parametrize("silent", [False, True])
def test_the_lease_of_a_dead_reader_ends_at_once_or_by_the_routers_notice(silent: bool) -> None:
    failure = Failure(at_s=0.8, pool="decode", worker=first_decode_worker(), silent=silent)
    outcome = finished(replace(spec_of(lease_s=10.0), failures=(failure,)))
    (record,) = outcome.records
    assert (record.outcome, record.attempts) == ("ok", 2)
    assert counts(outcome) == (2, 1, 1, 0)
    assert (record.end_s > 0.8 + PLAIN.worker_silence_s) is silent


def test_a_reader_that_dies_silently_loses_its_lease_after_its_length() -> None:
    failure = Failure(at_s=0.8, pool="decode", worker=first_decode_worker(), silent=True)
    spec = replace(spec_of(lease_s=2.0), failures=(failure,))
    outcome = finished(spec)
    (record,) = outcome.records
    assert (record.outcome, record.attempts) == ("ok", 2)
    assert counts(outcome) == (2, 1, 0, 1)


@pytest.mark.parametrize(("for_s", "expired"), [(1.0, 0), (4.0, 1), (30.0, 1)])
def test_a_cut_longer_than_a_lease_costs_the_hand_off_and_not_the_answer(
    for_s: float, expired: int
) -> None:
    cut = Cut(at_s=0.8, pool="decode", worker=first_decode_worker(), for_s=for_s)
    outcome = finished(replace(spec_of(), cuts=(cut,)))
    (record,) = outcome.records
    assert record.outcome == "ok"
    assert outcome.leases.ended[LeaseEnd.EXPIRED] == expired
    assert record.attempts == 1 + expired


def test_blocks_of_an_expired_lease_serve_those_that_wait_for_memory() -> None:
    few = replace(SLOW, kv_blocks=12)
    cut = Cut(at_s=0.0, pool="decode", worker=0, for_s=5.0)
    spec = replace(spec_of(lease_s=2.0, decode=1), cuts=(cut,))
    pools = (replace(spec.pools[0], worker=few), spec.pools[1])
    outcome = finished(replace(spec, pools=pools), count=2)
    assert [record.outcome for record in outcome.records] == ["ok", "ok"]
    assert outcome.leases.ended[LeaseEnd.EXPIRED] >= 1
    second = max(outcome.records, key=lambda record: record.first_s)
    assert 2.0 <= second.first_s < 3.0  # when the first one's lease had expired
