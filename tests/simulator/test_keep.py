"""KV kept between the turns of a session, as a policy says."""

from dataclasses import dataclass, field, replace
from math import inf

import pytest

from simulator.cluster import Cluster, Outcome
from simulator.spec import Failure, PoolRole, SimSpec
from simulator.workload.types import SimRequest
from tests.simulator.clusters import WORKER, ask, check_idle, colocated, pool, split


@dataclass
class Keep:
    """Keeps all for so long, and notes what it hears."""

    seconds: float
    by_session: bool = False
    pauses_s: list[float] = field(default_factory=list)

    def keep_s(self, request: SimRequest, memory_share: float, queue_s: float) -> float:
        return self.seconds

    def returned(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)


def turn(session: str, at_s: float, family: int, think_s: float | None = None) -> SimRequest:
    one = ask(at_s, prompt=160 if think_s is None else 176, family=family, output=4)
    return replace(one, session=session, think_s=think_s)


def spec_of(keep: Keep | None, kv_blocks: int = 24) -> SimSpec:
    pools = (pool(PoolRole.COLOCATED, 1, replace(WORKER, kv_blocks=kv_blocks)),)
    return replace(colocated(), pools=pools, closed_sessions=True, keep=keep)


def finished(spec: SimSpec, requests: list[SimRequest]) -> Outcome:
    cluster = Cluster(spec)
    outcome = cluster.run(sorted(requests, key=lambda request: request.at_s))
    for table in cluster._leases:
        table.check()
    if spec.keep is None or spec.keep.seconds < inf:  # type: ignore[attr-defined]
        cluster._events.run()
        check_idle(cluster)
    return outcome


def pressed() -> list[SimRequest]:
    """A session of two turns, and in its pause two others, each half as large as all the memory."""
    others = [turn(f"other{i}", 1.0 + 0.5 * i, 2 + i) for i in range(3)]
    return [turn("a", 0.0, 1), turn("a", 9.0, 1, think_s=3.0), *others]


def second_turn(outcome: Outcome) -> int:
    return [record for record in outcome.records if record.session == "a"][1].cached_tokens


@pytest.mark.parametrize(("seconds", "cached"), [(0.0, 0), (1.0, 0), (3.5, 160), (inf, 160)])
def test_kept_kv_outlives_the_others_until_its_time_is_over(seconds: float, cached: int) -> None:
    keep = Keep(seconds)
    assert second_turn(finished(spec_of(keep), pressed())) == cached
    assert keep.pauses_s == [pytest.approx(3.0)]


def test_without_a_policy_the_least_recently_used_goes() -> None:
    assert second_turn(finished(spec_of(None), pressed())) == 0


def test_where_nothing_can_run_for_want_of_memory_the_newest_is_let_go() -> None:
    sessions = [turn(f"s{i}", 1.0 * i, i + 1) for i in range(4)]
    outcome = finished(spec_of(Keep(inf), kv_blocks=24), sessions)
    assert [record.outcome for record in outcome.records] == ["ok"] * 4


def test_turns_may_wait_in_the_order_their_sessions_began() -> None:
    turns = [turn("a", 0.0, 1), turn("a", 9.0, 1, think_s=0.001)]
    turns += [turn(f"b{i}", 0.01 + 0.001 * i, 2 + i) for i in range(4)]
    first = {}
    for by_session in (False, True):
        keep = Keep(0.0, by_session=by_session)
        outcome = finished(spec_of(keep, kv_blocks=13), turns)
        records = [record for record in outcome.records if record.session == "a"]
        first[by_session] = records[1].ttft_s
    assert first[True] < 0.5 * first[False]


@pytest.mark.parametrize("silent", [False, True])
def test_an_answer_that_outlives_its_prefill_worker_is_kept_where_it_ended(silent: bool) -> None:
    keep = Keep(3.5)
    failure = Failure(at_s=0.3, pool="prefill", worker=0, silent=silent)
    spec = replace(split(prefill=2), closed_sessions=True, keep=keep, failures=(failure,))
    long = replace(ask(0.0, family=1, output=600), session="a")
    turns = [long, replace(ask(9.0, prompt=176, family=1), session="a", think_s=3.0)]
    turns += [turn(f"b{i}", 0.01 * i, 2 + i) for i in range(4)]
    outcome = finished(spec, turns)
    assert [record.outcome for record in outcome.records] == ["ok"] * 6
    assert keep.pauses_s == [pytest.approx(3.0)]


def test_nobody_is_left_to_keep_what_a_lost_worker_had() -> None:
    failure = Failure(at_s=0.2, pool="colocated", worker=0, restart_s=0.5)
    spec = replace(spec_of(Keep(inf)), failures=(failure,))
    outcome = finished(spec, [turn("a", 0.0, 1), turn("a", 9.0, 1, think_s=3.0)])
    assert [record.outcome for record in outcome.records] == ["ok"] * 2
