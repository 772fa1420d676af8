"""What the chooser learns from answers, and that no crowd of routers runs to one worker."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from core.clock import FakeClock
from core.errors import NoWorkers
from core.ids import Incarnation, Role, WorkerId
from core.messages import KvSnapshot, LegTimes
from core.stages import Stage
from router.chooser import Chooser
from router.config import RouterConfig
from router.index import PrefixIndex
from router.policies.build import build_policies
from router.pool import Pool
from router.progress import Mark, SequenceEnd
from router.types import Timings
from router.view import WorkerView
from tests.builders import make_request
from tests.router.views import HELLO, IDLE

PROMPT = tuple(range(1, 41))


class Link:
    def __init__(self, view: WorkerView) -> None:
        self.view = view


class Workers:
    """In place of router.fleet.Fleet: fixed workers of both roles, nothing connected."""

    def __init__(self, prefill: int = 1, decode: int = 1) -> None:
        self.index = PrefixIndex()
        views = {}
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for i in range(count):
                name = WorkerId(f"{role}-{i}")
                hello = replace(HELLO, worker_id=name, incarnation=Incarnation(name), role=role)
                view = views[name] = WorkerView(hello, self.index.join(name))
                view.load = replace(IDLE, running=2, context_tokens=100)
                view.apply_snapshot(KvSnapshot(next_number=1))
        self.everyone = Pool(views)
        self.pools = {
            role: Pool({w: v for w, v in views.items() if v.hello.role is role}) for role in Role
        }

    def pool(self, role: Role) -> Pool:
        return self.pools[role]

    def link(self, role: Role, worker_id: WorkerId) -> Link:
        return Link(self.everyone.views[worker_id])


def chooser(fleet: Workers, seed: int = 0) -> Chooser:
    policies = build_policies(RouterConfig())
    return Chooser(fleet, policies, FakeClock(1.0), Random(seed))  # type: ignore[arg-type]


def end(step_s: float, *, outcome: str = "ok", attempts: int = 1) -> SequenceEnd:
    """An answer of 12 tokens to 40, whose decode leg's first token came 10 steps before its end."""
    return SequenceEnd(
        request=make_request(PROMPT),
        outcome=outcome,
        attempts=(outcome,) * attempts,
        marks=(Mark(stage=Stage.DECODE, at_s=50.0, attempt=0, worker_id="decode-0"),),
        ended_at_s=50.0 + 10 * step_s,
        timings=Timings(
            prefill_worker="prefill-0",
            decode_worker="decode-0",
            attempts=attempts,
        ),
        output_tokens=12,
    )


def times(subject: Chooser, fleet: Workers) -> tuple[float, float]:
    """Predicted seconds of the prompt's prefill and of a step with what runs there."""
    curves = subject._known.curves
    kind = fleet.everyone.views[WorkerId("prefill-0")].kind
    return curves.of(kind).prefill.seconds(0, 40), curves.of(kind).decode.seconds(2, 100)


def test_what_prefill_and_decode_take_is_learned_from_answers() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    link = fleet.link(Role.PREFILL, WorkerId("prefill-0"))
    subject.prefilled(link, 40, LegTimes(prefill_s=4.0))  # type: ignore[arg-type]
    subject.ended(end(step_s=0.5))
    prefill_s, step_s = times(subject, fleet)
    assert prefill_s == pytest.approx(4.0, rel=0.2)
    assert step_s == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("how", [{"outcome": "cancelled"}, {"attempts": 2}])
def test_nothing_is_learned_from_what_did_not_go_straight(how: dict[str, object]) -> None:
    fleet = Workers()
    subject = chooser(fleet)
    before = times(subject, fleet)
    subject.ended(end(0.5, **how))  # type: ignore[arg-type]
    assert times(subject, fleet) == before


def test_failed_workers_are_chosen_only_when_there_is_no_other() -> None:
    fleet = Workers(prefill=2, decode=2)
    subject = chooser(fleet)
    first, second = Incarnation("prefill-0"), Incarnation("prefill-1")
    for _ in range(10):
        placed = subject.for_prefill(PROMPT, "", {first})
        assert placed.decision.worker_id == "prefill-1"
    assert subject.for_prefill(PROMPT, "", {first, second}).decision.worker_id in {
        "prefill-0",
        "prefill-1",
    }
    assert not subject.has_decode({Incarnation("decode-0"), Incarnation("decode-1")})
    assert subject.has_decode({Incarnation("decode-0")})


def test_a_move_goes_to_another_worker_or_to_the_one_named() -> None:
    fleet = Workers(decode=4)
    subject, source = chooser(fleet), Incarnation("decode-1")
    chosen = {subject.for_move(40, 60, source, None).decision.worker_id for _ in range(40)}
    assert chosen == {"decode-0", "decode-2", "decode-3"}
    named = subject.for_move(40, 60, source, WorkerId("decode-3"))
    assert named.decision.worker_id == "decode-3"
    with pytest.raises(NoWorkers, match="no other decode worker decode-1"):
        subject.for_move(40, 60, source, WorkerId("decode-1"))


def test_without_a_worker_of_the_role_there_is_no_placement() -> None:
    with pytest.raises(NoWorkers, match="no decode worker"):
        chooser(Workers(decode=0)).for_decode(40, 60, set())


def test_four_routers_that_know_nothing_of_each_other_do_not_herd() -> None:
    """Between two reports each places 40 prompts: of 160 on 16 workers, no worker gets a crowd."""
    counts: Counter[str] = Counter()
    for seed in range(4):
        fleet = Workers(prefill=16, decode=16)
        subject = chooser(fleet, seed)
        for i in range(40):
            prompt = tuple(range(1000 * i, 1000 * i + 40))
            placed = subject.for_prefill(prompt, "", set())
            view = placed.link.view
            assert view is not None
            view.submitted(i + 1, placed.load_tokens)
            counts[placed.decision.worker_id] += 1
            decode = subject.for_decode(40, 60, set())
            assert decode.link.view is not None
            decode.link.view.submitted(i + 1, decode.load_tokens)
            counts[decode.decision.worker_id] += 1
    prefills = [counts[f"prefill-{i}"] for i in range(16)]
    decodes = [counts[f"decode-{i}"] for i in range(16)]
    assert sum(prefills) == sum(decodes) == 160
    assert max(prefills) <= 25
    assert max(decodes) <= 20


def test_a_worker_whose_reports_freeze_is_not_chosen_for_ever() -> None:
    fleet = Workers(prefill=4)
    subject, chosen = chooser(fleet), Counter[str]()
    for i in range(400):
        placed = subject.for_prefill(PROMPT, "", set())
        view = placed.link.view
        assert view is not None
        view.submitted(i + 1, placed.load_tokens)
        if placed.decision.worker_id != "prefill-0":
            view.reported(replace(IDLE, last_submit=i + 1, queued_tokens=2000))
        chosen[placed.decision.worker_id] += 1
    assert 0 < chosen["prefill-0"] < 200
