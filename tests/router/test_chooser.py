"""What the chooser learns from answers, and that no crowd of routers runs to one worker."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from core.blocks import chain_hashes, root_hash
from core.clock import FakeClock
from core.errors import NoWorkers
from core.ids import Incarnation, Role, WorkerId
from core.messages import KvSnapshot, LegTimes
from core.stages import Stage
from core.step import StepWork, work_alone
from router.chooser import Chooser
from router.config import RouterConfig
from router.curves import PrefillCurve
from router.index import PrefixIndex
from router.local import LocalVerdict
from router.outliers import OutlierRules, Outliers
from router.policies.base import Slo
from router.policies.build import build_policies
from router.pool import Pool
from router.progress import Mark, SequenceEnd
from router.types import Shut, Timings
from router.view import WorkerView
from router.watcher import Unwatched
from tests.builders import make_request
from tests.router.views import HELLO, IDLE

PROMPT = tuple(range(1, 41))


class Link:
    def __init__(self, view: WorkerView) -> None:
        self.view = view


class Workers:
    """In place of router.fleet.Fleet: fixed workers of both roles, nothing connected."""

    def __init__(self, prefill: int = 1, decode: int = 1, colocated: int = 0) -> None:
        self.index = PrefixIndex()
        views = {}
        counts = {"prefill": prefill, "decode": decode, "colocated": colocated}
        for kind, count in counts.items():
            role = Role.DECODE if kind == "decode" else Role.PREFILL
            both = kind == "colocated"
            for i in range(count):
                name = WorkerId(f"{kind}-{i}")
                hello = replace(HELLO, worker_id=name, incarnation=Incarnation(name), role=role)
                view = views[name] = WorkerView(hello, self.index.join(name), is_colocated=both)
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


def chooser(fleet: Workers, seed: int = 0, outliers: Outliers | None = None) -> Chooser:
    policies, clock = build_policies(RouterConfig()), FakeClock(1.0)
    return Chooser(fleet, policies, clock, Random(seed), outliers)  # type: ignore[arg-type]


def ejecting(fleet: Workers, name: str, *, eject_s: float = 60.0) -> Outliers:
    """An opinion in which that worker was ejected at 0 s."""
    outliers = Outliers(OutlierRules(failures=1, eject_s=eject_s), Unwatched())
    role = fleet.everyone.views[WorkerId(name)].hello.role
    outliers.failed(Incarnation(name), fleet.pool(role).incarnations, 0.0)
    return outliers


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
    curves = subject._ask.known.curves
    kind = fleet.everyone.views[WorkerId("prefill-0")].kind
    return curves.of(kind).prefill.seconds(0, 40), curves.of(kind).decode.seconds(2, 100)


def took(prefill_s: float) -> LegTimes:
    """A prompt of 40 tokens, alone in its step."""
    return LegTimes(prefill_s=prefill_s, work=work_alone(0, 40))


@pytest.mark.parametrize("outcome", ["ok", "enough"], ids=["finish", "stop string"])
def test_what_prefill_and_decode_take_is_learned_from_answers(outcome: str) -> None:
    fleet = Workers()
    subject = chooser(fleet)
    link = fleet.link(Role.PREFILL, WorkerId("prefill-0"))
    subject.learning.prefilled(link, took(4.0))  # type: ignore[arg-type]
    subject.learning.ended(end(step_s=0.5, outcome=outcome))
    prefill_s, step_s = times(subject, fleet)
    assert prefill_s == pytest.approx(4.0, rel=0.2)
    assert step_s == pytest.approx(0.5, rel=0.2)


def test_a_prompt_in_a_step_with_others_teaches_what_all_of_it_takes() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    link = fleet.link(Role.PREFILL, WorkerId("prefill-0"))
    kind = fleet.everyone.views[WorkerId("prefill-0")].kind
    true = PrefillCurve(0.008, 2e-5, 1e-9)
    for i in range(64):
        subject._ask.clock.advance(1.0)  # type: ignore[attr-defined]
        work = StepWork().plus([(0, 40)] * (1 + i % 50))
        subject.learning.prefilled(link, LegTimes(prefill_s=true.of(work), work=work))  # type: ignore[arg-type]
    learned = subject._ask.known.curves.of(kind).prefill
    assert learned.seconds(0, 40) == pytest.approx(true.seconds(0, 40), rel=0.1)
    assert learned.queue_token_s(1024) == pytest.approx(true.queue_token_s(1024), rel=0.1)


def test_of_a_worker_that_does_not_tell_of_its_steps_no_curve_is_learned() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    before = times(subject, fleet)
    link = fleet.link(Role.PREFILL, WorkerId("prefill-0"))
    subject.learning.prefilled(link, LegTimes(prefill_s=4.0))  # type: ignore[arg-type]
    assert times(subject, fleet) == before


def test_a_step_is_learned_with_the_context_of_those_that_run_alone() -> None:
    fleet, seen = Workers(), []
    for waiting in (0, 6):
        view = fleet.everyone.views[WorkerId("decode-0")]
        context = 100 * (2 + waiting) // 2
        view.load = replace(IDLE, running=2, waiting=waiting, context_tokens=context)
        subject = chooser(fleet)
        subject.learning.ended(end(step_s=0.5, outcome="ok"))
        seen.append(times(subject, fleet)[1])
    assert seen[0] == seen[1]


def test_a_prompt_finds_the_least_loaded_decode_worker_unless_it_stays_or_nobody_asks() -> None:
    fleet = Workers(decode=2)
    subject = chooser(fleet)
    considered = subject.consider(PROMPT, "")
    assert subject.decode_load(considered, "current") is None  # before a step was measured
    for _ in range(3):
        subject._ask.clock.advance(1.0)  # type: ignore[attr-defined]
        subject.learning.ended(end(step_s=0.04, outcome="ok"))
    assert subject.decode_load(considered, "off") is None
    busy = fleet.everyone.views[WorkerId("decode-0")]
    both = subject.decode_load(considered, "current")
    busy.load = replace(IDLE, running=2000, context_tokens=100_000)
    assert subject.decode_load(considered, "current") == both
    there, here = (subject.decode_load_at(WorkerId(f"decode-{i}"), 40) for i in (0, 1))
    assert there is not None and here is not None
    assert there.share > 1.0 >= here.share
    assert subject.decode_load_at(WorkerId("gone"), 40) is None


@pytest.mark.parametrize("how", [{"outcome": "cancelled"}, {"attempts": 2}])
def test_nothing_is_learned_from_what_did_not_go_straight(how: dict[str, object]) -> None:
    fleet = Workers()
    subject = chooser(fleet)
    before = times(subject, fleet)
    subject.learning.ended(end(0.5, **how))  # type: ignore[arg-type]
    assert times(subject, fleet) == before


@pytest.mark.parametrize(("life", "is_out"), [("decode-0", False), ("an earlier one", True)])
def test_an_answer_clears_the_faults_of_the_life_that_gave_it_and_of_no_later_one(
    life: str, is_out: bool
) -> None:
    fleet, now = Workers(decode=4), Incarnation("decode-0")
    outliers = Outliers(OutlierRules(failures=2, eject_s=60.0), Unwatched())
    subject = chooser(fleet, outliers=outliers)
    peers = fleet.pool(Role.DECODE).incarnations
    outliers.failed(now, peers, 0.0, fault=True)
    outliers.answered(now, 0.5)  # as each of its answers begins well
    subject.learning.ended(replace(end(step_s=0.5), served_by=(Incarnation(life),)))
    outliers.failed(now, peers, 1.0, fault=True)
    assert (outliers.ejected_for(now) is not None) is is_out


def test_failed_workers_are_chosen_only_when_there_is_no_other() -> None:
    fleet = Workers(prefill=2, decode=2)
    subject = chooser(fleet)
    first, second = Incarnation("prefill-0"), Incarnation("prefill-1")
    for _ in range(10):
        placed = subject.for_prefill(PROMPT, "", Shut({first}))
        assert placed.decision.worker_id == "prefill-1"
    assert subject.for_prefill(PROMPT, "", Shut({first, second})).decision.worker_id in {
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


def test_a_move_avoids_an_ejected_worker_unless_it_is_named_or_the_last() -> None:
    fleet = Workers(decode=3)
    source = Incarnation("decode-1")
    subject = chooser(fleet, outliers=ejecting(fleet, "decode-0"))
    chosen = {subject.for_move(40, 60, source, None).decision.worker_id for _ in range(20)}
    assert chosen == {"decode-2"}
    named = subject.for_move(40, 60, source, WorkerId("decode-0"))
    assert named.decision.worker_id == "decode-0"
    pair = Workers(decode=2)
    subject = chooser(pair, outliers=ejecting(pair, "decode-0"))
    assert subject.for_move(40, 60, source, None).decision.worker_id == "decode-0"


def holding(fleet: Workers, name: str) -> None:
    """That worker has all of PROMPT."""
    view = fleet.everyone.views[WorkerId(name)]
    hashes = chain_hashes(PROMPT, view.hello.layout.block_size, root_hash(view.hello.model_id, ""))
    view.holdings.stored(hashes)


def measured(subject: Chooser, fleet: Workers) -> None:
    """Prefills were, and no target stands in the way."""
    kind = fleet.everyone.views[WorkerId("prefill-0")].kind
    for i in range(8):
        subject._ask.known.curves.saw_prefill(kind, work_alone(0, 40), 4.0, float(i))
    subject._ask.known = replace(subject._ask.known, slo=Slo(ttft_s=1e9, tpot_s=1e9))


def test_a_prompt_computed_by_a_decode_worker_is_the_probe_of_an_ejected_one() -> None:
    fleet = Workers(decode=2)
    outliers = ejecting(fleet, "decode-0", eject_s=0.5)
    subject = chooser(fleet, outliers=outliers)
    holding(fleet, "decode-0")
    measured(subject, fleet)
    considered = subject.consider(PROMPT, "", local_total=60)
    assert outliers.shut(1.0) == []
    assert subject.place_locally(considered) is not None
    assert outliers.shut(1.0) == ["decode-0"]


def test_an_explanation_says_when_the_decode_worker_computes_the_prompt() -> None:
    fleet = Workers(decode=2)
    subject = chooser(fleet)
    holding(fleet, "decode-1")
    measured(subject, fleet)
    both = subject.explain(PROMPT, "", 60, local=True)
    assert both.local is LocalVerdict.LOCAL
    assert both.prefill.worker_id == both.decode.worker_id == "decode-1"
    apart = subject.explain(PROMPT, "", 60, local=False)
    assert (apart.local, apart.prefill.worker_id) == (LocalVerdict.OFF, "prefill-0")


def test_a_prompt_for_one_worker_is_explained_by_all_the_ways_looked_at() -> None:
    fleet = Workers(decode=2)
    subject = chooser(fleet)
    holding(fleet, "decode-1")
    measured(subject, fleet)
    decision = subject.explain(PROMPT, "", 60, local=True).decode
    assert [scored.worker_id for scored in decision.candidates] == [
        "decode-1",
        "decode-0",
        "prefill-0",
    ]
    here, there, elsewhere = (dict(scored.terms) for scored in decision.candidates)
    assert here.keys() == there.keys() == {"queue_s", "work_s", "step_s"}
    assert here["work_s"] < there["work_s"]
    assert elsewhere["elsewhere_s"] == elsewhere["queue_s"] + elsewhere["work_s"]
    assert all(
        scored.cost == pytest.approx(sum(dict(scored.terms[:2]).values()))
        for scored in decision.candidates[:2]
    )
    assert decision.explain().startswith("decode-1 by sooner there: decode-1=3.5")


def test_an_answer_that_stays_is_explained_by_what_runs_here_and_there() -> None:
    decision = staying(Workers(decode=2)).explain(PROMPT, "", 60, local=True).prefill
    here, *there = decision.candidates
    assert here.worker_id == "prefill-0"
    assert dict(here.terms).keys() == {"queue_s", "work_s", "step_s", "cached_tokens"}
    assert {scored.worker_id for scored in there} == {"decode-0", "decode-1"}
    assert all(here.cost < scored.cost for scored in there)


def test_an_explanation_leaves_out_ejected_workers_as_a_placement_does() -> None:
    fleet = Workers(decode=2)
    subject = chooser(fleet, outliers=ejecting(fleet, "decode-0"))
    explained = {subject.explain(PROMPT, "", 60, local=True).decode.worker_id for _ in range(20)}
    assert explained == {"decode-1"}


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
            placed = subject.for_prefill(prompt, "", Shut())
            view = placed.link.view
            assert view is not None
            view.submitted(i + 1, placed.load_tokens, placed.prompt_tokens)
            counts[placed.decision.worker_id] += 1
            decode = subject.for_decode(40, 60, set())
            assert decode.link.view is not None
            decode.link.view.submitted(i + 1, decode.load_tokens, 0)
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
        placed = subject.for_prefill(PROMPT, "", Shut())
        view = placed.link.view
        assert view is not None
        view.submitted(i + 1, placed.load_tokens, placed.prompt_tokens)
        if placed.decision.worker_id != "prefill-0":
            view.reported(replace(IDLE, last_submit=i + 1, queued_tokens=2000))
        chosen[placed.decision.worker_id] += 1
    assert 0 < chosen["prefill-0"] < 200


def local_of(subject: Chooser) -> LocalVerdict:
    return subject.consider(PROMPT, "", local_total=60).local.verdict


def queue_at(fleet: Workers, name: str, tokens: int) -> None:
    view = fleet.everyone.views[WorkerId(name)]
    view.load = replace(IDLE, running=2, context_tokens=100, queued_tokens=tokens)


def test_a_prompt_that_would_wait_for_the_prefill_pool_goes_to_a_decode_worker() -> None:
    fleet = Workers(decode=2)
    subject = chooser(fleet)
    measured(subject, fleet)
    subject._ask.known = replace(subject._ask.known, slo=Slo(ttft_s=1e9, tpot_s=10.0))
    assert local_of(subject) is LocalVerdict.LOCAL  # within the time of a token, without a hand-off
    subject._ask.known = replace(subject._ask.known, slo=Slo(ttft_s=1e9, tpot_s=4.5), step_s=None)
    queue_at(fleet, "decode-0", 400)
    queue_at(fleet, "decode-1", 400)
    assert local_of(subject) is LocalVerdict.SLOWER
    queue_at(fleet, "prefill-0", 4000)
    assert local_of(subject) is LocalVerdict.TPOT  # the answers there would have steps of 6 s
    for _ in range(8):
        subject._ask.known.curves.saw_output(60)
    assert local_of(subject) is LocalVerdict.LOCAL  # which the next 30 steps make good


def test_what_was_sent_to_a_decode_worker_to_compute_is_a_queue_until_it_is_reported() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    measured(subject, fleet)
    subject._ask.known = replace(subject._ask.known, slo=Slo(ttft_s=1e9, tpot_s=4.5))
    busy = fleet.everyone.views[WorkerId("prefill-0")]
    busy.load = replace(IDLE, queued_tokens=400)
    view = fleet.everyone.views[WorkerId("decode-0")]
    view.submitted(1, 40, 0)  # hand-offs are none
    assert local_of(subject) is LocalVerdict.LOCAL
    view.submitted(2, 40, 4000)
    assert local_of(subject) is LocalVerdict.SLOWER
    view.ended(2)
    assert local_of(subject) is LocalVerdict.LOCAL


def prefilled_at_decode(subject: Chooser, fleet: Workers, prefill_s: float) -> float:
    """What decodes add to a step with a chunk, as a share, once a prompt took so long there."""
    link = fleet.link(Role.DECODE, WorkerId("decode-0"))
    subject.learning.prefilled(link, took(prefill_s))  # type: ignore[arg-type]
    return subject._ask.known.curves.of(link.view.kind).beside


def test_a_prompt_computed_beside_answers_teaches_what_they_add_and_not_what_a_prefill_takes() -> (
    None
):
    fleet = Workers()
    subject = chooser(fleet)
    measured(subject, fleet)
    before = times(subject, fleet)
    subject._ask.clock.advance(10.0)  # type: ignore[attr-defined]
    curves, view = subject._ask.known.curves, fleet.everyone.views[WorkerId("decode-0")]
    view.load = replace(IDLE, running=3, context_tokens=150, decoding=2, decoding_tokens=100)
    alone_s = curves.of(view.kind).prefill.seconds(0, 40)
    decode_s = curves.of(view.kind).decode.seconds(2, 100)
    for _ in range(200):
        share = prefilled_at_decode(subject, fleet, alone_s + 0.25 * decode_s)
    assert share == pytest.approx(0.25, rel=1e-3)
    assert times(subject, fleet) == before


def test_a_prompt_computed_where_nobody_decodes_teaches_nothing() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    measured(subject, fleet)
    view = fleet.everyone.views[WorkerId("decode-0")]
    view.load = replace(IDLE, running=4, context_tokens=160)  # other prompts
    assert prefilled_at_decode(subject, fleet, 400.0) == 1.0


def test_a_decode_worker_with_a_shorter_way_is_an_outlook_of_the_prompt() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    measured(subject, fleet)
    considered = subject.consider(PROMPT, "", local_total=60)
    assert considered.places == 2
    assert next(considered.outlooks()) == (considered.worker_id, considered.local.outlook)


def staying(fleet: Workers, config: RouterConfig | None = None) -> Chooser:
    """All is measured, the prompt is cached at the prefill worker, and both decode workers have
    answers that run.
    """
    policies = build_policies(config or RouterConfig())
    subject: Chooser = Chooser(fleet, policies, FakeClock(1.0), Random(0))  # type: ignore[arg-type]
    measured(subject, fleet)
    subject._ask.known = replace(subject._ask.known, slo=Slo(ttft_s=1e9, tpot_s=1.0))
    for _ in range(4):
        subject._ask.clock.advance(1.0)  # type: ignore[attr-defined]
        subject.learning.ended(end(step_s=0.5))
    fleet.everyone.views[WorkerId("prefill-0")].load = IDLE
    holding(fleet, "prefill-0")
    return subject


def test_an_answer_stays_at_a_prefill_worker_that_has_its_prompt_and_less_to_decode() -> None:
    fleet = Workers(decode=2)
    subject = staying(fleet)
    considered = subject.consider(PROMPT, "", local_total=60)
    assert considered.local.verdict is LocalVerdict.STAYS
    assert considered.worker_id == "prefill-0"
    assert [worker for worker, _ in considered.outlooks()] == ["prefill-0"]
    assert considered.places == 1  # a prompt like it is computed on prefill workers only
    placed = subject.place_locally(considered)
    assert placed is not None
    assert placed.link.view.hello.worker_id == "prefill-0"
    assert (placed.load_tokens, placed.prompt_tokens) == (40, 1)
    both = subject.explain(PROMPT, "", 60, local=True)
    assert both.local is LocalVerdict.STAYS
    assert both.prefill.worker_id == both.decode.worker_id == "prefill-0"


def test_it_does_not_where_the_switch_is_off() -> None:
    subject = staying(Workers(decode=2), RouterConfig(local_decode=False))
    assert local_of(subject) is LocalVerdict.SLOWER


def test_it_does_not_where_a_tenth_of_the_prompt_is_still_to_be_computed() -> None:
    fleet = Workers(decode=2)
    subject = staying(fleet)
    longer = (*PROMPT, *range(100, 105))
    assert subject.consider(longer, "", local_total=60).local.verdict is LocalVerdict.SLOWER


def test_it_does_not_where_as_much_runs_as_at_decode_workers() -> None:
    fleet = Workers(decode=2)
    subject = staying(fleet)
    fleet.everyone.views[WorkerId("prefill-0")].load = replace(IDLE, running=2, context_tokens=100)
    assert local_of(subject) is LocalVerdict.SLOWER


def test_what_was_sent_to_stay_there_counts_before_a_report_shows_it() -> None:
    """A crowd that forks from one cached prompt, all at once."""
    fleet = Workers(decode=2)
    subject, stayed = staying(fleet), 0
    view = fleet.everyone.views[WorkerId("prefill-0")]
    for number in range(1, 100):
        considered = subject.consider(PROMPT, "", local_total=60)
        if considered.local.verdict is not LocalVerdict.STAYS:
            break
        placed = subject.place_locally(considered)
        assert placed is not None
        view.submitted(number, placed.load_tokens, placed.prompt_tokens)
        stayed = number
    assert stayed == 3  # with the fourth their context would be more than at a decode worker


def test_a_prompt_that_stays_is_the_probe_of_an_ejected_prefill_worker() -> None:
    fleet = Workers(prefill=2)
    subject = staying(fleet)
    fleet.everyone.views[WorkerId("prefill-1")].load = replace(IDLE, queued_tokens=4000)
    subject._ask.outliers = outliers = ejecting(fleet, "prefill-0", eject_s=0.5)
    considered = subject.consider(PROMPT, "", local_total=60)
    assert (considered.local.verdict, considered.worker_id) == (LocalVerdict.STAYS, "prefill-0")
    assert outliers.shut(1.0) == []
    subject.place_locally(considered)
    assert outliers.shut(1.0) == ["prefill-0"]


def test_a_prompt_waits_longer_at_a_prefill_worker_whose_steps_are_shared_with_answers() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    measured(subject, fleet)
    subject._ask.known = replace(subject._ask.known, step_s=None)
    view, new = fleet.everyone.views[WorkerId("prefill-0")], tuple(range(1000, 1400))
    kind = subject._ask.known.curves.of(view.kind)
    view.load = replace(IDLE, queued_tokens=4096)
    alone = subject.consider(new, "").query.expected_s(WorkerId("prefill-0"))
    view.load = replace(view.load, running=3, decoding=2, decoding_tokens=100)
    beside = subject.consider(new, "").query.expected_s(WorkerId("prefill-0"))
    decode_s = kind.beside * kind.decode.seconds(3, 500)
    assert beside[0] - alone[0] == pytest.approx(4096 / 512 * decode_s)
    assert beside[1] - alone[1] == pytest.approx(decode_s)


def test_what_a_prefill_takes_is_not_learned_where_it_is_mostly_the_answers_steps() -> None:
    fleet = Workers()
    subject = staying(fleet)  # steps of half a second
    view = fleet.everyone.views[WorkerId("prefill-0")]
    view.load = replace(IDLE, running=3, decoding=2, decoding_tokens=100)
    before = times(subject, fleet)
    link = fleet.link(Role.PREFILL, WorkerId("prefill-0"))
    subject.learning.prefilled(link, took(3.0))  # type: ignore[arg-type]
    assert times(subject, fleet) == before


def test_a_slow_prefill_worker_is_found_beside_answers_as_well() -> None:
    fleet = Workers(prefill=3)
    outliers = Outliers(OutlierRules(failures=1, eject_s=60.0), Unwatched())
    subject = chooser(fleet, outliers=outliers)
    measured(subject, fleet)
    before = times(subject, fleet)
    for view in fleet.pool(Role.PREFILL).views.values():
        view.load = replace(IDLE, running=3, decoding=2, decoding_tokens=100)
    kind = subject._ask.known.curves.of(fleet.everyone.views[WorkerId("prefill-0")].kind)
    predicted_s = kind.prefill.seconds(0, 40) + kind.decode.seconds(2, 100)
    for _ in range(20):
        subject._ask.clock.advance(1.0)  # type: ignore[attr-defined]
        for name, factor in (("prefill-0", 1.0), ("prefill-1", 1.0), ("prefill-2", 4.0)):
            link = fleet.link(Role.PREFILL, WorkerId(name))
            subject.learning.prefilled(link, took(factor * predicted_s))  # type: ignore[arg-type]
    assert times(subject, fleet) != before  # they add little, and the rest is learned from
    assert [w for w in fleet.pool(Role.PREFILL).incarnations if outliers.ejected_for(w)] == [
        "prefill-2"
    ]


def test_answers_at_a_prefill_worker_tell_their_length_and_nothing_of_a_decode_step() -> None:
    fleet = Workers()
    subject = chooser(fleet)
    before = times(subject, fleet)
    for _ in range(8):
        subject._ask.clock.advance(1.0)  # type: ignore[attr-defined]
        subject.learning.answer_ended(WorkerId("prefill-0"), 12, 99.0)
    assert times(subject, fleet) == before
    assert subject._ask.known.curves.residuals
