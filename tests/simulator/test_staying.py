"""Answers that stay where their prompt was computed, and what a router learns from such steps."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from simulator.cluster import Cluster
from simulator.job import Record
from simulator.spec import Failure, SimSpec
from simulator.workload.types import SimRequest
from tests.simulator.clusters import ask, check_idle, colocated, split

BUSY = [ask(0.2 * i, output=900) for i in range(2)]
"""Answers at the decode worker, all the time."""
TAUGHT = [ask(1.0 + 0.7 * i, output=40) for i in range(6)]
"""One after the other: what a prefill takes, and a decode step beside others."""
STAYS = [ask(6.0, output=1, family=1), ask(7.0, output=100, family=1)]
"""The first leaves the prompt in the prefill worker's cache."""


def run(spec: SimSpec, requests: list[SimRequest]) -> tuple[list[Record], Cluster]:
    cluster = Cluster(spec)
    records = list(cluster.run(requests).records)
    assert {record.outcome for record in records} == {"ok"}
    check_idle(cluster)
    return records, cluster


def test_an_answer_stays_at_the_prefill_worker_that_has_its_prompt() -> None:
    (*_, last), _ = run(split(), [*BUSY, *TAUGHT, *STAYS])
    assert (last.prefill_worker, last.decode_worker) == ("prefill-00000", "prefill-00000")
    assert last.cached_tokens == 144
    assert last.first_s - last.at_s == pytest.approx(0.016, abs=0.002)  # no step of another's


@pytest.mark.parametrize("key", ["local_decode", "local_prefill"])
def test_it_crosses_where_that_is_switched_off(key: str) -> None:
    router = RouterConfig.model_validate({"admission": "off", key: False})
    (*_, last), _ = run(replace(split(), router=router), [*BUSY, *TAUGHT, *STAYS])
    assert (last.prefill_worker, last.decode_worker) == ("prefill-00000", "decode-00000")


def test_prompts_that_come_meanwhile_share_its_steps() -> None:
    long = ask(7.2, prompt=1600)
    (*_, alone), _ = run(split(), [*BUSY, *TAUGHT, long])
    (*_, beside), _ = run(split(), [*BUSY, *TAUGHT, *STAYS, long])
    steps = 1600 / 64
    assert beside.ttft_s - alone.ttft_s == pytest.approx(steps * 0.01, rel=0.2)


def test_it_goes_on_elsewhere_when_its_worker_dies() -> None:
    failure = Failure(pool="prefill", worker=0, at_s=7.5, restart_s=0.5)
    spec = replace(split(), failures=(failure,))
    (*_, last), _ = run(spec, [*BUSY, *TAUGHT, *STAYS])
    assert last.attempts == 2
    assert last.decode_worker == "decode-00000"


def test_of_a_colocated_pool_prompts_and_answers_are_learned_from_as_they_are() -> None:
    requests = [ask(0.1 * i, output=40) for i in range(60)]
    _, cluster = run(colocated(2), requests)
    chooser = cluster._routers[0].chooser
    view = next(link.view for link in cluster._routers[0].fleet.links())
    speed = chooser._ask.known.curves.of(view.kind)
    assert min(speed.prefill_fit.observed, speed.decode_fit.observed) > 10
    seconds = speed.prefill.seconds(0, 160, view.hello.step_tokens)
    assert seconds == pytest.approx(0.16 + 3 * 0.01, rel=0.2)
