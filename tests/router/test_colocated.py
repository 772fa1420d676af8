"""Workers that answer what they compute, beside prefill workers: what a router makes of them."""

from dataclasses import replace

import pytest

from core.ids import Incarnation, WorkerId
from core.step import work_alone
from router.chooser import Chooser
from router.curves import Curves, kind_of
from router.local import LocalVerdict
from router.outliers import OutlierRules, Outliers
from router.policies.base import Slo
from router.watcher import Unwatched
from tests.router.test_chooser import PROMPT, Workers, chooser, ejecting, end, holding
from tests.router.views import HELLO, IDLE

ALONE, SPLIT = WorkerId("colocated-0"), WorkerId("prefill-0")
ANSWERS = replace(IDLE, running=2, decoding=2, context_tokens=100, decoding_tokens=100)


def chosen(subject: Chooser, *failed: str) -> set[str]:
    """For many prompts that have failed on these."""
    prompts, shut = (range(i, i + 40) for i in range(40)), list(map(Incarnation, failed))
    return {subject.consider(prompt, "", shut).worker_id for prompt in prompts}


def test_they_are_a_kind_of_their_own() -> None:
    curves, colocated = Curves(), kind_of(HELLO, is_colocated=True)
    larger = colocated._replace(num_blocks=colocated.num_blocks + 1)
    for second in range(4):
        curves.saw_prefill(kind_of(HELLO), work_alone(0, 1000), 0.5, float(second))
        curves.saw_prefill(larger, work_alone(0, 1000), 0.9, float(second))
    assert curves.of(kind_of(HELLO)).prefill.seconds(0, 1000) == pytest.approx(0.5, rel=0.1)
    assert curves.of(colocated).prefill.seconds(0, 1000) == pytest.approx(0.9, rel=0.1)


def test_their_curve_holds_the_answers_that_run_beside_a_prompt() -> None:
    fleet = Workers(colocated=1)
    subject = chooser(fleet)
    for worker in (ALONE, SPLIT):
        before = subject.consider(PROMPT, "").query.ttft_s(worker)
        fleet.everyone.views[worker].load = ANSWERS
        after = subject.consider(PROMPT, "").query.ttft_s(worker)
        assert (after == before) is (worker == ALONE)


@pytest.mark.parametrize("worker", [ALONE, SPLIT])
def test_their_answers_teach_what_a_step_takes_there(worker: WorkerId) -> None:
    fleet = Workers(colocated=1)
    subject = chooser(fleet)
    subject.learning.answer_ended(worker, 100, 2.0)
    fit = subject._ask.known.curves.of(fleet.everyone.views[worker].kind).decode_fit
    assert (fit.observed > 0) is (worker == ALONE)


def test_slow_answers_there_are_not_compared_with_those_of_decode_workers() -> None:
    fleet, rules = Workers(decode=3, colocated=1), OutlierRules(failures=1, eject_s=60.0)
    subject = chooser(fleet, outliers=(outliers := Outliers(rules, Unwatched())))
    for turn in range(200):
        subject._ask.clock.advance(0.1)  # type: ignore[attr-defined]
        for worker in fleet.everyone.workers:
            step_s = 0.02 if worker != ALONE else 0.02 * 1.05**turn
            subject.learning.answer_ended(worker, 102, 100 * step_s)
    assert outliers.ejected_for(Incarnation(ALONE)) is None


def test_what_they_compute_wants_no_decode_worker() -> None:
    fleet = Workers(colocated=1)
    subject = chooser(fleet)
    for _ in range(3):
        subject._ask.clock.advance(1.0)  # type: ignore[attr-defined]
        subject.learning.ended(end(step_s=0.04))
    for failed, alone in ((SPLIT, True), (ALONE, False)):
        considered = subject.consider(PROMPT, "", [Incarnation(failed)])
        assert considered.is_alone is alone
        assert (subject.decode_load(considered, "current") is None) is alone


def test_a_prompt_cached_there_needs_no_leave_to_stay() -> None:
    fleet = Workers(prefill=0, colocated=1)
    subject = chooser(fleet)
    subject._ask.known = replace(subject._ask.known, slo=Slo(ttft_s=1e9, tpot_s=1.0))
    kind = fleet.everyone.views[ALONE].kind
    for _ in range(4):
        subject._ask.clock.advance(1.0)  # type: ignore[attr-defined]
        subject._ask.known.curves.saw_prefill(
            kind, work_alone(0, 40), 40.0, subject._ask.clock.now_s()
        )
        subject.learning.answer_ended(ALONE, 12, 5.0)
        subject.learning.ended(end(step_s=0.5))
    fleet.everyone.views[ALONE].load = IDLE
    holding(fleet, ALONE)
    considered = subject.consider(PROMPT, "", local_total=60)
    assert considered.local.verdict is not LocalVerdict.STAYS
    assert considered.is_alone
    assert subject.place(considered).queued is not None  # as of every prompt that is placed


def test_prompts_go_only_there_while_no_decode_worker_is_ready() -> None:
    subject = chooser(Workers(prefill=3, decode=0, colocated=2))
    both = {"colocated-0", "colocated-1"}
    assert chosen(subject) == chosen(subject, *both) == both
    assert chosen(subject, ALONE) == {"colocated-1"}
    assert subject.consider_at(SPLIT, PROMPT, "", ()) is None
    assert chosen(chooser(Workers(prefill=3, colocated=2))) > both


def test_without_them_prompts_wait_for_a_decode_worker_at_prefill_workers() -> None:
    assert chosen(chooser(Workers(decode=0))) == {SPLIT}


def test_an_ejected_one_is_chosen_rather_than_a_worker_whose_answers_nobody_takes() -> None:
    fleet = Workers(decode=0, colocated=1)
    assert chosen(chooser(fleet, outliers=ejecting(fleet, ALONE))) == {ALONE}
