"""Running answers that move: production offers, simulated copies; no block is lost."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from simulator.cluster import Cluster, Outcome
from simulator.spec import Failure, NetworkSpec, PoolRole, SimSpec
from simulator.workload.types import SimRequest
from tests.simulator.clusters import WORKER, ask, check_idle, pool, split

TURNS = RouterConfig(
    admission="off", local_prefill=False, requeue=False, decode_policy="round_robin"
)
ROOMY = replace(WORKER, kv_blocks=2000)
SMALL = replace(WORKER, kv_blocks=60)


def spec_of(*, moves: bool = True, control_s: float = 0.02) -> SimSpec:
    """Two decode workers of 960 tokens that answers are dealt to in turns."""
    return replace(
        split(),
        pools=(pool(PoolRole.PREFILL, 1, ROOMY), pool(PoolRole.DECODE, 2, SMALL)),
        router=TURNS,
        network=NetworkSpec(control_s=control_s),
        moves_answers=moves,
    )


def uneven(count: int = 8) -> list[SimRequest]:
    """Every other one is long, so that one worker is full and the other one has room."""
    sizes = [(240, 300), (32, 20)]
    return [
        ask(0.5 * i, prompt=sizes[i % 2][0], output=sizes[i % 2][1], family=i + 1)
        for i in range(count)
    ]


def finished(spec: SimSpec, requests: list[SimRequest]) -> Outcome:
    cluster = Cluster(spec)
    outcome = cluster.run(requests)
    cluster._events.run()
    check_idle(cluster)
    for table in cluster._leases:
        table.check()
    return outcome


def test_an_answer_leaves_a_full_worker_for_one_with_room_and_who_waits_there_goes_on() -> None:
    stays, moves = (finished(spec_of(moves=m), uneven()).records for m in (False, True))
    assert [r.outcome for r in (*stays, *moves)] == ["ok"] * 16
    assert not any(r.moves for r in stays)
    assert any(r.moves for r in moves)
    assert max(r.transfer_s for r in moves) < 0.5 * max(r.transfer_s for r in stays)


def test_an_answer_stands_still_for_its_last_block_and_the_closing_question_alone() -> None:
    records = finished(spec_of(control_s=0.02), uneven()).records
    pauses_s = [r.pause_s for r in records if r.moves]
    last_s = 300 * 1_000 / 1e9  # all it generates has no hash here, and moves with the last block
    assert all(0.02 <= pause_s <= 0.02 + last_s + 1e-6 for pause_s in pauses_s)


def test_a_lone_answer_takes_as_long_as_unmoved_but_for_the_pause() -> None:
    """The second one is dealt to the small worker, which it fills just before its end."""
    asked = [ask(0.0, prompt=16, output=2), ask(0.5, prompt=240, output=300, family=1)]
    spec, took_s = spec_of(), {}
    small = replace(SMALL, kv_blocks=35)
    pools = (spec.pools[0], pool(PoolRole.DECODE, 1, name="big"), pool(PoolRole.DECODE, 1, small))
    for moves in (False, True):
        record = finished(replace(spec, pools=pools, moves_answers=moves), asked).records[1]
        assert record.moves == moves
        took_s[moves] = record.end_s - record.first_s - record.pause_s
    assert took_s[True] == pytest.approx(took_s[False], abs=1e-9)


@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("at_s", [1.0, 1.6, 2.0, 2.4, 3.0])
def test_the_death_of_either_end_costs_a_pause(worker: int, at_s: float) -> None:
    slow = replace(SMALL, nic_bytes_per_s=2e5)  # most of the time something is on its way
    failure = Failure(at_s=at_s, pool="decode", worker=worker, restart_s=0.5)
    spec = replace(spec_of(control_s=0.3), failures=(failure,))
    spec = replace(spec, pools=(spec.pools[0], pool(PoolRole.DECODE, 2, slow)))
    outcome = finished(spec, uneven())
    assert [record.outcome for record in outcome.records] == ["ok"] * 8


def test_the_same_seed_moves_the_same_answers() -> None:
    first, second = (finished(spec_of(), uneven(16)).records for _ in range(2))
    assert first == second
