"""The part times what a router really does, for requests of both ways through the workers."""

from random import Random

import pytest

from benchmarks.routing import decision
from benchmarks.routing.standing import StandingFleet, taught_chooser
from benchmarks.routing.synthetic import BLOCK_TOKENS, synthetic_prompts
from benchmarks.routing.traces import Prompt, finer
from core.clock import FakeClock
from core.ids import Role
from router.local import LocalVerdict

GUESSED = {LocalVerdict.OFF, LocalVerdict.NOBODY, LocalVerdict.UNMEASURED}
PROMPTS = [
    Prompt(p.at_s, p.tokens, finer(p.hashes, BLOCK_TOKENS // 16)) for p in synthetic_prompts(200, 0)
]


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> StandingFleet:
    monkeypatch.setattr(decision, "_BLOCKS", 100_000)
    standing = StandingFleet(8, Random(0))
    decision._fill(standing.index, standing.views, PROMPTS, Random(0))
    return standing


def test_the_curves_are_taught_and_answers_run(fleet: StandingFleet) -> None:
    chooser = taught_chooser(fleet, FakeClock(), Random(0))
    seen = {
        chooser.consider(range(p.tokens), "", hashes=p.hashes, local_total=p.tokens).local.verdict
        for p in PROMPTS
    }
    assert not seen & GUESSED
    assert all(view.load is not None and view.load.running for view in fleet.views)


def test_both_ways_are_taken_and_what_is_on_its_way_stays_bounded(fleet: StandingFleet) -> None:
    placing = decision._Placing(fleet, FakeClock(), Random(0))
    for prompt in PROMPTS:
        assert placing.place(prompt) >= 0
    assert 0.2 < placing.alone / len(PROMPTS) < 0.9
    queued = placing._chooser.queued
    on_way = sum(len(queued.at(worker)) for worker in queued.workers())
    assert on_way == decision._ON_WAY * len(fleet.pool(Role.PREFILL).workers)


class Quiet:
    def progress(self, *_: object) -> None:
        pass


def test_the_policys_part_is_less_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "_BLOCKS", 100_000)
    cost = decision._measure(Quiet(), 8, PROMPTS, 300)  # type: ignore[arg-type]
    assert 0 < cost.policy_us(0.5) < cost.us(0.5)
