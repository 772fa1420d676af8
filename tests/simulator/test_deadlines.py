"""`router.request_timeout_s` ends a request wherever it is, as live."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from simulator.cluster import Cluster
from simulator.spec import Failure, SimSpec
from tests.simulator.clusters import ask, check_idle, run, split
from tests.simulator.test_forwarding import full


def within(timeout_s: float, spec: SimSpec) -> SimSpec:
    router = spec.router.model_copy(update={"request_timeout_s": timeout_s})
    return replace(spec, router=router)


@pytest.mark.parametrize("local", [False, True])
def test_an_answer_longer_than_its_time_ends_then_and_gives_its_memory_back(local: bool) -> None:
    router = RouterConfig(admission="off", local_prefill=local)
    cluster = Cluster(within(1.0, replace(split(), router=router)))
    late, next_one = cluster.run([ask(output=500), ask(0.1, output=5)]).records
    assert (late.outcome, next_one.outcome) == ("deadline", "ok")
    assert late.first_s < 0.5
    cluster._events.run(until_s=2.0)
    check_idle(cluster)


def test_a_prompt_ends_in_a_workers_queue_and_those_behind_it_are_served_sooner() -> None:
    requests = [ask(0.001 * i, prompt=640, output=1) for i in range(4)]
    records = run(within(1.0, split()), requests).records
    assert [record.outcome for record in records] == ["ok", "deadline", "deadline", "deadline"]
    late = [ask(0.9, output=1), ask(1.2, output=1)]
    *_, last = run(within(1.0, split()), [*requests, *late]).records
    assert last.ttft_s == pytest.approx(0.160, abs=0.05)


def test_who_waits_in_line_ends_there() -> None:
    requests = [ask(0.001 * i, output=1) for i in range(6)]
    records = run(within(0.5, full(prefill=1)), requests).records
    assert [record.outcome for record in records] == ["ok"] * 3 + ["deadline"] * 3


def test_who_waits_for_a_worker_ends_once() -> None:
    dead = (Failure(at_s=0.0, pool="prefill", worker=0, restart_s=2.0),)
    records = run(replace(within(1.0, split()), failures=dead), [ask(0.5), ask(1.6)]).records
    assert [record.outcome for record in records] == ["deadline", "ok"]


def test_a_worker_that_kept_one_waiting_for_the_whole_of_its_time_is_tried_less() -> None:
    router = RouterConfig(admission="off", eject_after_failures=1, eject_s=60, local_prefill=False)
    spec = within(1.0, replace(split(prefill=2), router=router))
    stuck, *after = run(spec, [ask(prompt=3000), *[ask(2.0 + i) for i in range(4)]]).records
    assert stuck.outcome == "deadline"
    assert {record.prefill_worker for record in after} == {"prefill-00000", "prefill-00001"} - {
        stuck.prefill_worker
    }
