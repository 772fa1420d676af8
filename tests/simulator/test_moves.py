"""Queued prompts move from a prefill worker that has fallen behind, as in the live router."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster, Outcome
from simulator.spec import Failure, SimSpec
from simulator.workload.types import SimRequest
from tests.simulator.clusters import ask, check_idle, split

# Whoever holds a prefix is asked first, until it is hot: a queue grows there.
STICKY = RouterConfig(admission="off", local_prefill=False, prefill_policy="dualmap")
WARM = ask(0.0, prompt=96, family=1, output=2)


def spec_of(*, requeue: bool, prefill: int = 2) -> SimSpec:
    router = STICKY.model_copy(update={"requeue": requeue})
    return replace(split(prefill, 2), router=router, slo=Slo(ttft_s=1.5, tpot_s=0.1))


def burst() -> list[SimRequest]:
    """A prompt of 96 tokens, then twelve at once that begin with it, and differ after that."""
    rest = [ask(2.0 + 0.001 * i, prompt=320, family=10 + i, output=3) for i in range(12)]
    return [WARM, *(replace(one, hashes=(*WARM.hashes, *one.hashes[6:])) for one in rest)]


def moved(spec: SimSpec, requests: Sequence[SimRequest]) -> Outcome:
    cluster = Cluster(spec)
    outcome = cluster.run(requests)
    check_idle(cluster)
    return outcome


def test_prompts_leave_a_queue_that_breaks_the_target_for_an_idle_worker() -> None:
    requests = burst()
    stays = moved(spec_of(requeue=False), requests)
    moves = moved(spec_of(requeue=True), requests)
    assert stays.prompts_moved == 0
    assert moves.prompts_moved > 0
    again = [record.prefill_worker for record in moves.records if record.attempts == 2]
    assert len(again) == moves.prompts_moved
    assert len(set(again)) == 1  # where less was queued
    assert [record.outcome for record in moves.records] == ["ok"] * 13
    assert max(r.ttft_s for r in moves.records) < max(r.ttft_s for r in stays.records)


def test_a_prompt_moves_once_at_most_and_none_that_has_begun() -> None:
    requests = burst()
    records = moved(spec_of(requeue=True), requests).records
    assert max(record.attempts for record in records) == 2
    began_first = min(records[1:], key=lambda record: record.first_s)
    assert began_first.attempts == 1


def test_nothing_moves_while_every_queue_keeps_the_target() -> None:
    spec = replace(spec_of(requeue=True), slo=Slo(ttft_s=50.0, tpot_s=0.1))
    requests = burst()
    assert moved(spec, requests).prompts_moved == 0


@pytest.mark.parametrize("at_s", [2.05, 2.3, 2.6])
def test_a_move_and_a_death_lose_no_request_and_no_block(at_s: float) -> None:
    failing = tuple(Failure(at_s=at_s, pool="prefill", worker=i, restart_s=1.0) for i in range(2))
    requests = burst()
    outcome = moved(replace(spec_of(requeue=True), failures=failing), requests)
    assert [record.outcome for record in outcome.records] == ["ok"] * 13


def test_the_same_seed_moves_the_same_prompts() -> None:
    requests = burst()
    first, second = moved(spec_of(requeue=True), requests), moved(spec_of(requeue=True), requests)
    assert first == second
    assert first.prompts_moved > 0
