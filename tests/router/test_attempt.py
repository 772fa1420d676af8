"""The order in which an attempt takes what its workers say, whatever order they say it in."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from core.clock import SystemClock
from core.errors import DeadlineExceeded, TransferFailed, WorkerFailed, WorkerLost
from core.ids import Incarnation, LeaseId, ModelId, Role, WorkerId
from core.messages import (
    Accepted,
    Cancel,
    DecodeSubmit,
    LegFailed,
    LegTimes,
    LegTokens,
    LoadReport,
    Moved,
    Offer,
    Offered,
    PrefillSubmit,
    Rejected,
    RouterToWorker,
    Withdraw,
    Withdrawn,
    WorkerHello,
)
from core.registry import WorkerRecord
from core.sampling import FinishReason
from core.stages import Stage
from core.step import work_alone
from router.attempt import Attempt
from router.chooser import Chooser
from router.client import Leg, LegEvent, LegListener
from router.config import RouterConfig
from router.index import PrefixIndex
from router.local import LocalVerdict
from router.outliers import OutlierRules, Outliers
from router.placement import Local, Placement
from router.policies.base import Decision
from router.policies.build import build_policies
from router.pool import Pool
from router.progress import Progress
from router.queued import QueuedPrompt
from router.types import Generated, MigrationReport, Requeued, Shut
from router.view import WorkerView
from router.watcher import Unwatched
from tests.builders import make_engine, make_prompt, make_request, soon

PROMPT = make_prompt(9)
FAILED = LegFailed(number=0, code="worker_lost", message="gone", stage=Stage.DECODE)


class ScriptedLink:
    """In place of router.client.WorkerLink: notes what it is told, says what the test wants."""

    def __init__(self, name: str, role: Role) -> None:
        info = make_engine(1).info
        self.record = WorkerRecord(
            worker_id=WorkerId(name),
            incarnation=Incarnation(name),
            role=role,
            epoch=1,
            address=name,
            router_address=name,
            model_id=ModelId("m"),
            pid=1,
        )
        hello = WorkerHello(
            worker_id=self.record.worker_id,
            incarnation=self.record.incarnation,
            role=role,
            epoch=1,
            model_id=info.model_id,
            layout=info.layout,
            num_blocks=64,
            context_tokens=256,
            peer_address=name,
        )
        self.view = WorkerView(hello, PrefixIndex().join(hello.worker_id))
        self.view.load = LoadReport(
            last_submit=0,
            queued_tokens=0,
            waiting=0,
            running=0,
            context_tokens=0,
            free_blocks=64,
            total_blocks=64,
        )
        self.sent: list[RouterToWorker] = []
        self.legs: list[Leg] = []
        self.ended: list[Leg] = []

    def submit(
        self,
        build: Callable[[int], PrefillSubmit | DecodeSubmit],
        listener: LegListener,
        load_tokens: int,
        prompt_tokens: int = 0,
    ) -> Leg:
        number = len(self.legs)
        self.sent.append(build(number))
        self.legs.append(Leg(self, number, listener))  # type: ignore[arg-type]
        return self.legs[-1]

    def cancel(self, leg: Leg, reason: str) -> None:
        if leg not in self.ended:
            self.ended.append(leg)
            self.sent.append(Cancel(number=leg.number, reason=reason))

    def finish(self, leg: Leg) -> None:
        self.ended.append(leg)

    def send(self, message: RouterToWorker) -> None:
        self.sent.append(message)

    def say(self, event: LegEvent) -> None:
        """Of its newest leg, to whom the link tells it."""
        leg = self.legs[-1]
        match event:
            case LegTokens(tokens=(token,), finish=None) if leg.on_token is not None:
                leg.on_token(token)
            case _:
                leg.listener(leg, replace(event, number=leg.number))


class ScriptedFleet:
    """In place of router.fleet.Fleet."""

    def __init__(self, *links: ScriptedLink) -> None:
        self._links = {link.record.worker_id: link for link in links}
        self.index = PrefixIndex()
        self.everyone = Pool({name: link.view for name, link in self._links.items()})

    def pool(self, role: Role) -> Pool:
        views = self.everyone.views
        return Pool({name: view for name, view in views.items() if view.hello.role is role})

    def link(self, role: Role, worker_id: WorkerId) -> ScriptedLink:
        return self._links[worker_id]


class Scene:
    """An attempt whose decode leg is at `source`; `destination` is the only other place."""

    def __init__(
        self, max_tokens: int = 20, *, answer_s: float = 5.0, deadline_s: float = 30.0
    ) -> None:
        self.prefill = ScriptedLink("p", Role.PREFILL)
        self.source = ScriptedLink("d0", Role.DECODE)
        self.destination = ScriptedLink("d1", Role.DECODE)
        fleet = ScriptedFleet(self.prefill, self.source, self.destination)
        policies = build_policies(RouterConfig())
        clock = SystemClock()
        self.outliers = Outliers(OutlierRules(failures=1, eject_s=60.0), Unwatched())
        chooser = Chooser(fleet, policies, clock, Random(0), self.outliers)  # type: ignore[arg-type]
        request = make_request(PROMPT, max_tokens=max_tokens, deadline_s=deadline_s)
        self.progress = Progress(request, clock)
        # As long as the destination counts as failed, the source is chosen.
        self.shut = Shut(failed={self.destination.record.incarnation})
        self.attempt = Attempt(
            chooser, self.progress, 0, self.shut, clock, sink=self, answer_s=answer_s
        )
        self.chooser = chooser
        self.tokens: list[int] = []

    def start_at_decode(self) -> None:
        """As if the source held most of the prompt."""
        self.start_alone_at(self.source)

    def start_alone_at(self, link: ScriptedLink) -> None:
        considered = self.chooser.consider(PROMPT, "")
        decision = Decision(link.record.worker_id, ())
        placed = Placement(link=link, decision=decision, load_tokens=9)  # type: ignore[arg-type]
        prefills = link.record.role is Role.PREFILL
        verdict = LocalVerdict.STAYS if prefills else LocalVerdict.LOCAL
        self.attempt.start(considered._replace(local=Local(verdict, placed)))

    def __enter__(self) -> "Scene":
        self.attempt.__enter__()
        self.attempt.start()
        self.prefill.say(Accepted(number=0, lease_id=LeaseId(1), lease_s=10.0))
        return self

    def __exit__(self, *error: object) -> None:
        self.attempt.__exit__(None, None, None)

    def token(self, token: int) -> None:
        self.tokens.append(token)

    def take(self, item: Generated) -> None:
        self.tokens += item.tokens

    def begin(self) -> None:
        """The first token, and one of the source."""
        self.prefill.say(tokens(0))
        self.source.say(tokens(1))

    async def offered(self) -> "asyncio.Task[MigrationReport]":
        """A move on its way: the destination has the submit."""
        migrating = asyncio.create_task(self.attempt.migrate(None, 5.0))
        await asyncio.sleep(0)
        assert isinstance(self.source.sent[-1], Offer)
        self.source.say(Offered(number=0, lease_id=LeaseId(7)))
        submit, first = self.destination.sent[-1], self.source.sent[0]
        assert isinstance(submit, DecodeSubmit) and isinstance(first, DecodeSubmit)
        assert submit.handoff is not None
        assert (submit.handoff.lease_id, submit.handoff.live) == (7, True)
        assert submit.handoff.owner_id == "d0"
        assert (submit.tokens, submit.output_position) == (first.tokens, first.output_position)
        assert submit.sequence_id == first.sequence_id
        return migrating


def tokens(*values: int, finish: FinishReason | None = None) -> LegTokens:
    return LegTokens(number=0, tokens=values, finish=finish)


async def test_what_the_destination_says_before_moved_waits_for_it() -> None:
    with Scene() as s:
        s.begin()
        migrating = await s.offered()
        s.destination.say(tokens(3))
        s.destination.say(tokens(4))
        s.source.say(tokens(2))
        assert s.tokens == [0, 1, 2]
        s.source.say(Moved(number=0))
        assert s.tokens == [0, 1, 2, 3, 4]
        s.destination.say(tokens(5, finish=FinishReason.LENGTH))
        report = await soon(migrating)
        assert isinstance(report, MigrationReport)
        assert (report.moved, report.reason, report.tokens_meanwhile) == (True, "", 1)
        assert s.tokens == [0, 1, 2, 3, 4, 5]
        assert s.progress.finished


async def test_a_move_that_is_over_before_the_first_token_was_heard_keeps_the_order() -> None:
    with Scene() as s:
        s.source.say(tokens(1))
        migrating = await s.offered()
        s.destination.say(tokens(3))
        s.source.say(tokens(2))
        s.source.say(Moved(number=0))
        s.destination.say(tokens(4))
        assert s.tokens == []
        s.prefill.say(tokens(0))
        assert s.tokens == [0, 1, 2, 3, 4]
        assert (await migrating).moved


@pytest.mark.parametrize(
    "last", [FAILED, Rejected(number=0, code="overloaded", message="full")], ids=["failed", "no"]
)
async def test_the_source_goes_on_when_the_destination_does_not(last: LegEvent) -> None:
    with Scene() as s:
        s.begin()
        migrating = await s.offered()
        s.destination.say(tokens(99))
        s.destination.say(last)
        report = await migrating
        assert (report.moved, report.reason) == (False, getattr(last, "message", None))
        s.source.say(tokens(2))
        assert s.tokens == [0, 1, 2]


async def test_a_sequence_that_moved_to_nobody_costs_the_attempt() -> None:
    with Scene() as s:
        s.begin()
        migrating = await s.offered()
        s.destination.say(FAILED)
        assert not (await migrating).moved
        s.source.say(Moved(number=0))
        with pytest.raises(TransferFailed):
            await soon(s.attempt.end())


async def test_a_move_given_up_too_late_costs_the_attempt() -> None:
    with Scene() as s:
        s.begin()
        migrating = await s.offered()
        migrating.cancel()
        await asyncio.wait([migrating])
        assert isinstance(s.destination.sent[-1], Cancel)
        s.destination.say(tokens(3))
        s.source.say(Moved(number=0))
        with pytest.raises(TransferFailed):
            await soon(s.attempt.end())


async def test_an_offer_answered_too_late_is_not_taken_up() -> None:
    with Scene() as s:
        s.begin()
        report = await s.attempt.migrate(None, 0.01)
        assert (report.moved, report.reason) == (False, "it was not done within 0.01 s")
        s.source.say(Offered(number=0, lease_id=LeaseId(7)))
        s.source.say(tokens(2))
        assert s.destination.sent == []
        assert s.tokens == [0, 1, 2]


async def test_leaving_cancels_every_leg() -> None:
    with Scene() as s:
        s.begin()
        migrating = await s.offered()
    assert isinstance(s.source.sent[-1], Cancel)
    assert isinstance(s.destination.sent[-1], Cancel)
    assert (await migrating).reason == "the request has ended"
    assert s.prefill.ended and not isinstance(s.prefill.sent[-1], Cancel)


async def test_the_lives_that_served_a_sequence_are_those_of_its_links() -> None:
    with Scene() as s:
        s.begin()
        assert s.progress.end(None).served_by == ("p", "d0")
        await s.offered()
        s.source.say(Moved(number=0))
        assert s.progress.end(None).served_by == ("p", "d1")


async def test_leaving_after_a_move_cancels_only_the_leg_that_is_left() -> None:
    with Scene() as s:
        s.begin()
        migrating = await s.offered()
        s.source.say(Moved(number=0))
    assert not isinstance(s.source.sent[-1], Cancel)
    assert isinstance(s.destination.sent[-1], Cancel)
    report = await migrating
    assert (report.moved, report.reason) == (True, "the request has ended")


# -- how tokens reach the sink --------------------------------------------------------------------


async def test_single_tokens_of_a_running_answer_pass_the_hops_by() -> None:
    with Scene() as s:
        assert s.source.legs[0].on_token is None
        s.begin()
        assert s.source.legs[0].on_token is not None
        s.source.say(tokens(2))
        s.source.say(tokens(3, 4))
        s.source.say(tokens(5))
        assert s.tokens == s.progress.tokens == [0, 1, 2, 3, 4, 5]


async def test_a_move_that_stays_gives_single_tokens_their_way_back() -> None:
    with Scene() as s:
        s.begin()
        migrating = await s.offered()
        assert s.source.legs[0].on_token is None
        s.destination.say(FAILED)
        await migrating
        s.source.say(tokens(2))
        assert s.source.legs[0].on_token is not None
        assert s.tokens == [0, 1, 2]


async def test_the_end_comes_with_the_last_token() -> None:
    with Scene() as s:
        s.begin()
        s.source.say(tokens(2, finish=FinishReason.LENGTH))
        await soon(s.attempt.end())
        assert s.source.ended == s.source.legs


@pytest.mark.parametrize("values", [(2,), (2, 3)], ids=["one token", "several"])
async def test_what_the_sink_raises_ends_the_attempt_and_nothing_more_is_given(
    values: tuple[int, ...],
) -> None:
    class Full(Exception):
        pass

    def refuse(_: object) -> None:
        raise Full

    with Scene() as s:
        s.begin()
        s.token = s.take = refuse  # type: ignore[method-assign]
        s.source.say(tokens(*values))
        del s.token, s.take
        s.source.say(tokens(9))
        with pytest.raises(Full):
            await soon(s.attempt.end())
        assert s.tokens == [0, 1]
    assert isinstance(s.source.sent[-1], Cancel)


# -- without a prefill worker ---------------------------------------------------------------------


async def test_a_decode_worker_that_computes_the_prompt_gives_all_tokens() -> None:
    s = Scene(max_tokens=3)
    with s.attempt:
        s.start_at_decode()
        submit = s.source.sent[0]
        assert isinstance(submit, DecodeSubmit)
        assert submit.handoff is None
        s.source.say(Accepted(number=0))
        s.source.say(replace(tokens(0), times=LegTimes(prefill_s=0.5, cached_tokens=8)))
        s.source.say(tokens(1))
        s.source.say(tokens(2, finish=FinishReason.LENGTH))
        await soon(s.attempt.end())
    assert s.tokens == [0, 1, 2]
    assert not s.prefill.sent
    timings = s.progress.timings()
    assert (timings.prefill_s, timings.cached_tokens, timings.attempts) == (0.5, 8, 1)


async def test_what_it_took_there_is_learned_from() -> None:
    s = Scene()
    s.source.view.load = replace(s.source.view.load, running=4, decoding=3, decoding_tokens=200)
    beside = s.chooser._ask.known.curves.of(s.source.view.kind).beside
    with s.attempt:
        s.start_at_decode()
        s.source.say(Accepted(number=0))
        took = LegTimes(prefill_s=0.5, work=work_alone(0, len(PROMPT)))
        s.source.say(replace(tokens(0), times=took))
    assert s.chooser._ask.known.curves.of(s.source.view.kind).beside > beside


async def test_a_prefill_worker_that_does_not_answer_for_both_is_the_last_of_its_pool() -> None:
    s = Scene(answer_s=0.01)
    with s.attempt:
        s.start_alone_at(s.prefill)
        with pytest.raises(WorkerLost):
            await soon(s.attempt.end())
    assert s.prefill.record.incarnation in s.shut.failed
    assert not s.outliers.ejected_for(s.prefill.record.incarnation)


async def test_a_no_to_an_answer_that_would_stay_is_none_to_its_prompt() -> None:
    s = Scene()
    with s.attempt:
        s.start_alone_at(s.prefill)
        s.prefill.say(Rejected(number=0, code="overloaded", message="too many sequences"))
        assert isinstance(s.prefill.sent[-1], PrefillSubmit)
        assert not s.shut.full


async def test_cached_tokens_of_the_answer_do_not_count_as_the_prompts() -> None:
    s = Scene()
    s.progress.emit(tuple(range(8)))  # in an attempt before
    items: list[Generated] = []
    s.take = items.append  # type: ignore[method-assign]
    with s:
        s.prefill.say(replace(tokens(8), times=LegTimes(cached_tokens=len(PROMPT) + 4)))
    assert [item.cached_tokens for item in items] == [len(PROMPT)]
    assert s.progress.timings().cached_tokens == len(PROMPT)


async def test_its_no_leaves_the_way_by_a_prefill_worker() -> None:
    s = Scene()
    with s.attempt:
        s.start_at_decode()
        s.source.say(Rejected(number=0, code="overloaded", message="full"))
        assert isinstance(s.prefill.sent[0], PrefillSubmit)
        s.shut.failed.clear()
        s.shut.failed.add(s.source.record.incarnation)
        s.prefill.say(Accepted(number=0, lease_id=LeaseId(1), lease_s=10.0))
        submit = s.destination.sent[0]
        assert isinstance(submit, DecodeSubmit)
        assert submit.handoff is not None
        s.prefill.say(tokens(0))
        s.destination.say(tokens(1))
    assert s.tokens == [0, 1]


async def test_what_the_workers_of_an_ended_attempt_still_say_reaches_nobody() -> None:
    with Scene() as s:
        s.begin()
        s.source.say(FAILED)
        with pytest.raises(WorkerLost):
            await s.attempt.end()
    s.source.say(tokens(8))
    s.prefill.say(tokens(9, finish=FinishReason.STOP))
    assert s.tokens == s.progress.tokens == [0, 1]
    assert not s.progress.finished


# -- whose fault it was --------------------------------------------------------------------------


def ejected(s: Scene) -> list[str]:
    links = (s.prefill, s.source, s.destination)
    return [
        link.record.worker_id for link in links if s.outliers.ejected_for(link.record.incarnation)
    ]


async def test_a_submit_that_is_neither_accepted_nor_refused_is_tried_elsewhere() -> None:
    with Scene(answer_s=0.01) as s:
        with pytest.raises(WorkerLost, match="did not take or refuse"):
            await soon(s.attempt.end())
        assert s.source.record.incarnation in s.shut.failed
        assert ejected(s) == ["d0"]


async def test_an_answer_that_was_there_when_its_time_was_up_still_counts() -> None:
    with Scene(answer_s=0.0) as s:
        for _ in range(3):
            await asyncio.sleep(0)
        s.source.say(Accepted(number=0))
        s.begin()
        s.source.say(tokens(2, finish=FinishReason.LENGTH))
        await soon(s.attempt.end())
        assert s.tokens == [0, 1, 2]
        assert ejected(s) == []


async def test_an_accepted_leg_may_take_its_time() -> None:
    with Scene(answer_s=0.01, deadline_s=0.1) as s:
        s.source.say(Accepted(number=0))
        with pytest.raises(DeadlineExceeded):
            await soon(s.attempt.end())


async def test_a_failed_leg_counts_against_its_worker() -> None:
    with Scene() as s:
        s.source.say(FAILED)
        with pytest.raises(WorkerLost):
            await s.attempt.end()
        assert ejected(s) == ["d0"]


async def test_a_workers_own_fault_counts_against_it_and_may_be_tried_elsewhere() -> None:
    with Scene() as s:
        s.source.say(replace(FAILED, code="internal_error", message="no valid logits"))
        with pytest.raises(WorkerFailed, match="worker d0 failed: no valid logits") as caught:
            await s.attempt.end()
        assert (caught.value.retryable, caught.value.worker_id) == (True, "d0")
        assert ejected(s) == ["d0"]
        assert s.source.record.incarnation in s.shut.failed


async def test_a_workers_no_does_not_count_against_it() -> None:
    with Scene() as s:
        s.shut.failed.clear()
        s.source.say(Rejected(number=0, code="overloaded", message="full"))
        assert s.destination.legs
        assert ejected(s) == []


async def test_time_that_ran_out_counts_against_the_one_waited_for() -> None:
    with Scene(deadline_s=0.05) as s:
        s.source.say(Accepted(number=0))
        s.prefill.say(tokens(0))
        with pytest.raises(DeadlineExceeded):
            await soon(s.attempt.end())
        assert ejected(s) == ["d0"]


async def test_time_that_ran_out_on_a_running_answer_counts_against_nobody() -> None:
    with Scene(deadline_s=0.05) as s:
        s.source.say(Accepted(number=0))
        s.begin()
        with pytest.raises(DeadlineExceeded):
            await soon(s.attempt.end())
        assert ejected(s) == []


# -- a prompt that has not begun ----------------------------------------------------------------

ELSEWHERE = WorkerId("p1")


def all_queued(s: Scene) -> list[QueuedPrompt]:
    queued = s.chooser.queued
    return [prompt for worker in queued.workers() for prompt in queued.at(worker)]


def asked_to_move(s: Scene) -> None:
    """As the rebalancer does it."""
    (prompt,) = all_queued(s)
    assert prompt.move is not None
    prompt.move(ELSEWHERE)
    assert s.prefill.sent[-1] == Withdraw(number=0)


async def test_a_withdrawn_prompt_ends_the_attempt_and_cancels_its_decode_leg() -> None:
    with Scene() as s:
        asked_to_move(s)
        s.prefill.say(Withdrawn(number=0))
        with pytest.raises(Requeued) as requeued:
            await s.attempt.end()
    assert requeued.value.to == ELSEWHERE
    assert isinstance(s.source.sent[-1], Cancel)
    assert not any(isinstance(message, Cancel) for message in s.prefill.sent)
    assert all_queued(s) == []
    assert s.shut.failed == {s.destination.record.incarnation}


async def test_a_decode_worker_that_hears_first_of_the_withdrawn_lease_is_not_at_fault() -> None:
    with Scene() as s:
        asked_to_move(s)
        s.source.say(replace(FAILED, code=TransferFailed.code))
        with pytest.raises(Requeued):
            await s.attempt.end()
    assert isinstance(s.prefill.sent[-1], Cancel)
    assert not s.outliers.ejected_for(s.prefill.record.incarnation)


async def test_a_prompt_that_has_begun_all_the_same_goes_on() -> None:
    with Scene() as s:
        asked_to_move(s)
        s.begin()
        s.source.say(tokens(2, finish=FinishReason.LENGTH))
        await s.attempt.end()
    assert s.tokens == [0, 1, 2]


async def test_a_hand_off_that_fails_after_the_prompt_has_begun_is_a_failure() -> None:
    with Scene() as s:
        asked_to_move(s)
        s.begin()
        s.source.say(replace(FAILED, code=TransferFailed.code))
        with pytest.raises(TransferFailed):
            await s.attempt.end()


async def test_a_prompt_that_was_moved_is_not_moved_again() -> None:
    scene = Scene()
    scene.progress.requeued = True
    with scene as s:
        (prompt,) = all_queued(s)
        assert prompt.move is None
