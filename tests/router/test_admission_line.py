"""The line of those who wait for a place."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from random import Random

import pytest

from core.clock import Clock, FakeClock, SystemClock
from core.errors import DeadlineExceeded, NoWorkers, Overloaded
from core.ids import Role, WorkerId
from core.messages import LegTimes
from core.step import work_alone
from router.admission import QueueBounds
from router.admission_line import Admission, SloClass
from router.chooser import Chooser
from router.config import DecodeAdmission, RouterConfig
from router.decode_load import DecodeLoad
from router.placement import Considered, Outlook
from router.policies.base import Decision, Slo
from router.policies.build import build_policies
from router.progress import Progress
from router.watcher import RejectReason, Unwatched
from tests.builders import make_prompt, make_request, prefill_submit, running_cluster, soon, until
from tests.router.views import Workers

SLO = Slo(ttft_s=2.5, tpot_s=0.1)  # two seconds, as what is predicted may take longer


class Places:
    """In place of the chooser: answers what the test says of the workers."""

    def __init__(self, *outlooks: tuple[float, float]) -> None:
        workers = Workers()
        workers.add("a")
        self._query = workers.prefill()
        self.now = outlooks
        self.worker = "a"
        """That prompts go to, and no other."""
        self.looks = 0
        self.decode: DecodeLoad | None = None
        self.gone = False
        """No worker is there."""
        self.half = False
        """None of the other pool is."""

    def ready(self) -> bool:
        return not (self.gone or self.half)

    def consider(self, *_prompt: object, **_how: object) -> Considered:
        self.looks += 1
        if self.gone:
            raise NoWorkers("none")
        worker = WorkerId(self.worker)
        outlooks = [(worker, Outlook(queue_s, work_s)) for queue_s, work_s in self.now]

        class Seen(Considered):
            def outlooks(self) -> Iterator[tuple[WorkerId, Outlook]]:
                return iter(outlooks)

        return Seen(self._query, Decision(worker, ()))

    def decode_load(self, considered: Considered, rule: DecodeAdmission) -> DecodeLoad | None:
        return None if rule == "off" else self.decode


class Noted(Unwatched):
    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.reasons: list[RejectReason] = []

    def rejected(self, reason: RejectReason) -> None:
        self.reasons.append(reason)

    def queued(self, requests: int) -> None:
        self.lengths.append(requests)


BOUNDS = QueueBounds(requests=10, prompt_tokens=1000)
WORKER_WAIT_S = 15.0
BUSY, FREE = (2.0, 0.1), (0.0, 0.1)


class Door:
    """An admission over `Places`, and the requests that came to it."""

    def __init__(
        self,
        group: asyncio.TaskGroup,
        *,
        bounds: QueueBounds = BOUNDS,
        clock: Clock | None = None,
        enabled: bool = True,
    ) -> None:
        self.places = Places(BUSY)
        self.noted = Noted()
        self.clock = clock or FakeClock()
        self.admission = Admission(
            self.places,  # type: ignore[arg-type]
            self.clock,
            bounds,
            self.noted,
            ready=self.places.ready,
            enabled=enabled,
            decode="current",
            worker_wait_s=WORKER_WAIT_S,
        )
        self.entered: list[str] = []
        self.refused: dict[str, Exception] = {}
        self.leave = asyncio.Event()
        self._group = group

    async def come(
        self, name: str, tokens: int = 10, *, deadline_s: float = 60.0, late_s: float = 0.0
    ) -> "asyncio.Task[None]":
        task = self._group.create_task(self._enter(name, tokens, deadline_s, late_s))
        await self.settle()
        return task

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    async def _enter(self, name: str, tokens: int, deadline_s: float, late_s: float) -> None:
        request_id, _, choice = name.partition("/")
        request = make_request(make_prompt(tokens), name=request_id, deadline_s=deadline_s)
        request = replace(request, choice=int(choice or 0))
        progress = Progress(request, self.clock)
        progress.arrived_at_s -= late_s
        try:
            async with self.admission.admitted(progress, SloClass(name="default", slo=SLO)):
                self.entered.append(name)
                self.places.now = (BUSY,)  # it is submitted, and fills the worker
                await self.leave.wait()
        except (Overloaded, NoWorkers, DeadlineExceeded) as error:
            self.refused[name] = error

    async def report(self, *outlooks: tuple[float, float]) -> None:
        self.places.now = outlooks
        self.admission.look()
        await self.settle()


@asynccontextmanager
async def door(
    bounds: QueueBounds = BOUNDS,
    *,
    clock: Clock | None = None,
    enabled: bool = True,
) -> AsyncIterator[Door]:
    async with asyncio.TaskGroup() as group:
        yield (opened := Door(group, bounds=bounds, clock=clock, enabled=enabled))
        opened.leave.set()
        opened.places.now = (FREE,)
        while opened.admission.waiting:
            await opened.report(FREE)


async def test_who_waits_is_placed_when_a_report_makes_room_one_at_a_time_in_order() -> None:
    async with door() as d:
        for name in ("a", "b", "c"):
            await d.come(name)
        assert d.entered == []
        await d.report(FREE)
        assert d.entered == ["a"]
        await d.report(FREE)
        assert d.entered == ["a", "b"]
        assert d.noted.lengths == [1, 2, 3, 2, 1]


async def test_a_report_makes_only_the_first_of_the_line_look() -> None:
    async with door() as d:
        for name in ("a", "b", "c"):
            await d.come(name)
        looks = d.places.looks
        await d.report(BUSY)
        assert d.places.looks == looks + 1


async def test_who_comes_later_does_not_pass_those_who_wait() -> None:
    async with door() as d:
        await d.come("a")
        d.places.now = (FREE,)
        await d.come("b")
        assert d.entered == []
        await d.report(FREE)
        assert d.entered == ["a"]


async def test_who_goes_where_none_of_the_line_would_does_not_wait_for_it() -> None:
    async with door() as d:
        await d.come("long")
        d.places.worker, d.places.now = "b", (FREE,)
        await d.come("next turn")
        assert d.entered == ["next turn"]
        d.places.now = (BUSY,)
        await d.come("no room there either")
        assert d.entered == ["next turn"]
        assert d.admission.waiting == 2
        d.places.worker = "a"


LONG, CALM = (1.0, 30.0), (0.1, 30.0)
"""A prompt that cannot be in time, on a worker with a queue and on one without."""


async def test_who_cannot_be_in_time_waits_for_a_calm_moment_and_holds_up_nobody() -> None:
    async with door() as d:
        d.places.now = (LONG,)
        await d.come("long")
        await d.come("another long")
        assert d.admission.waiting == 2
        d.places.now = ((1.0, 0.1),)
        await d.come("short")
        assert d.entered == ["short"]
        await d.report(LONG)
        assert d.entered == ["short"]
        await d.report(CALM)
        assert d.entered == ["short", "long"]


async def test_where_many_prompts_are_long_they_join_a_queue_as_others_do() -> None:
    async with door() as d:
        for i in range(12):
            d.places.now = (LONG,)
            await d.come(f"long {i}")
        await d.report(LONG)
        assert d.entered == ["long 0"]


async def test_a_long_prompt_of_many_choices_is_one() -> None:
    async with door() as d:
        for i in range(12):
            d.places.now = (LONG,)
            await d.come(f"long/{i}")
        await d.report(LONG)
        assert d.entered == []
        await d.report(CALM)
        assert d.entered[0] == "long/0"
        d.places.now = (CALM,)


async def test_who_cannot_be_in_time_comes_after_all_who_can() -> None:
    async with door() as d:
        d.places.now = (LONG,)
        await d.come("long")
        d.places.now = (BUSY,)
        await d.come("short")
        d.places.now = (CALM,)
        await d.come("late comer")
        assert d.entered == []
        await d.report(FREE)
        assert d.entered == ["short"]


async def test_who_came_in_a_gap_and_turns_out_to_be_late_holds_up_nobody() -> None:
    clock = FakeClock()
    async with door(clock=clock) as d:
        d.places.half = True
        await d.come("long")
        d.places.half = False
        await d.report(LONG)
        d.places.now = ((1.0, 0.1),)
        await d.come("short")
        assert d.entered == ["short"]


async def test_who_has_waited_too_long_to_be_in_time_lets_others_go_first() -> None:
    clock = FakeClock()
    async with door(clock=clock) as d:
        d.places.now = ((1.0, 1.4),)
        await d.come("first")
        clock.advance(0.7)
        await d.report((1.0, 1.4))
        d.places.now = ((1.0, 0.1),)
        await d.come("second")
        assert d.entered == ["second"]
        await d.report((0.1, 1.4))
        assert d.entered == ["second", "first"]


async def test_those_who_cannot_be_in_time_leave_room_in_the_line_for_the_others() -> None:
    async with door(QueueBounds(requests=2, prompt_tokens=1000)) as d:
        d.places.now = (LONG,)
        await d.come("long")
        await d.come("another long")
        assert set(d.refused) == {"another long"}
        assert d.noted.reasons == [RejectReason.QUEUE_FULL]
        d.places.now = (BUSY,)
        await d.come("short")
        assert d.admission.waiting == 2


async def test_nobody_passes_one_of_whom_nothing_is_known_yet() -> None:
    clock = FakeClock()
    async with door(clock=clock) as d:
        d.places.half = True
        await d.come("came in the gap")
        d.places.half = False
        d.places.worker, d.places.now = "b", (FREE,)
        await d.come("later")
        assert d.entered == []
        await d.report(FREE)
        assert d.entered == ["came in the gap"]


async def test_who_has_a_place_is_refused_at_once_when_no_decode_worker_can_serve_it() -> None:
    async with door() as d:
        d.places.now, d.places.decode = (FREE,), DecodeLoad(1.5, 4.0)
        await d.come("a")
        error = d.refused["a"]
        assert isinstance(error, Overloaded)
        assert error.retry_after_s == 4.0
        assert "router.admission_decode" in error.message
        assert d.noted.reasons == [RejectReason.DECODE]


async def test_who_waits_is_not_judged_by_decode_workers_before_its_turn() -> None:
    async with door() as d:
        await d.come("a")
        d.places.decode = DecodeLoad(1.5, 4.0)
        await d.report(BUSY)
        assert not d.refused
        d.places.decode = DecodeLoad(0.5, 0.0)
        await d.report(FREE)
        assert d.entered == ["a"]


async def test_past_hope_the_refusal_comes_at_once_and_says_when_to_come_again() -> None:
    async with door() as d:
        d.places.now = ((12.0, 0.5),)
        await d.come("a")
        error = d.refused["a"]
        assert isinstance(error, Overloaded)
        assert error.retry_after_s == 10.5
        assert "2.5 s" in error.message
        assert d.noted.reasons == [RejectReason.TARGET]


async def test_who_has_waited_in_vain_is_refused_before_the_target_has_passed() -> None:
    async with door(clock=(clock := FakeClock())) as d:
        await d.come("a")
        clock.advance(1.0)
        await d.report(BUSY)
        assert isinstance(d.refused["a"], Overloaded)


async def test_without_any_report_the_wait_ends_by_itself() -> None:
    async with door(clock=SystemClock()) as d:
        d.places.now = ((2.98, 0.5),)
        await d.come("a")
        await until(lambda: "a" in d.refused, "the refusal")


@pytest.mark.parametrize(
    "bounds",
    [QueueBounds(requests=2, prompt_tokens=1000), QueueBounds(requests=10, prompt_tokens=25)],
    ids=["requests", "tokens"],
)
async def test_a_full_queue_takes_no_more(bounds: QueueBounds) -> None:
    async with door(bounds) as d:
        for name in ("a", "b", "c"):
            await d.come(name)
        assert list(d.refused) == ["c"]
        assert d.noted.reasons == [RejectReason.QUEUE_FULL]
        assert d.admission.waiting == 2


@pytest.mark.parametrize(
    "bounds",
    [QueueBounds(requests=2, prompt_tokens=1000), QueueBounds(requests=10, prompt_tokens=25)],
    ids=["requests", "tokens"],
)
async def test_the_choices_of_a_request_are_one_of_those_that_wait(bounds: QueueBounds) -> None:
    async with door(bounds) as d:
        for name in ("a/0", "a/1", "a/2", "b/0", "b/1", "c/0", "a/3"):
            await d.come(name)
        assert list(d.refused) == ["c/0"]
        assert d.admission.waiting == 2
        assert str(d.refused["c/0"]).startswith("2 requests wait")


async def test_a_request_waits_until_the_last_of_its_choices_has_left() -> None:
    async with door(QueueBounds(requests=1, prompt_tokens=1000)) as d:
        choices = [await d.come(name) for name in ("a/0", "a/1")]
        choices[0].cancel()
        await d.come("b")
        assert list(d.refused) == ["b"]
        choices[1].cancel()
        await d.come("c")
        assert (list(d.refused), d.admission.waiting) == (["b"], 1)


async def test_an_empty_queue_takes_a_prompt_of_any_length() -> None:
    async with door(QueueBounds(requests=10, prompt_tokens=25)) as d:
        await d.come("a", 100)
        assert d.admission.waiting == 1


async def test_a_client_that_leaves_is_out_of_the_line_at_once() -> None:
    async with door() as d:
        first = await d.come("a")
        await d.come("b")
        first.cancel()
        await d.settle()
        assert d.admission.waiting == 1
        await d.report(FREE)
        assert d.entered == ["b"]


async def test_the_next_choice_of_a_request_under_way_is_not_refused() -> None:
    async with door() as d:
        d.places.now = (FREE,)
        await d.come("a/0")
        d.places.now = ((100.0, 0.5),)
        await d.come("a/1")
        d.places.now = ((100.0, 0.5),)
        await d.come("b/0")
        assert d.entered == ["a/0", "a/1"]
        assert list(d.refused) == ["b/0"]


async def test_a_request_whose_time_is_up_leaves_the_line() -> None:
    async with door(clock=(clock := FakeClock())) as d:
        await d.come("a", deadline_s=0.4)
        clock.advance(0.41)
        await d.report(BUSY)
        assert isinstance(d.refused["a"], DeadlineExceeded)


async def test_a_restart_that_was_waited_for_does_not_count_as_load() -> None:
    async with door() as d:
        d.places.now = (FREE,)
        await d.come("a", late_s=10.0)
        assert d.entered == ["a"]


@pytest.mark.parametrize("lost", ["gone", "half"])
@pytest.mark.parametrize("enabled", [True, False], ids=["slo", "off"])
async def test_without_workers_so_many_wait_and_no_more(enabled: bool, lost: str) -> None:
    async with door(QueueBounds(requests=2, prompt_tokens=1000), enabled=enabled) as d:
        vars(d.places)[lost] = True
        d.places.now = (FREE,)
        for name in ("a", "b", "c"):
            await d.come(name)
        assert (d.entered, d.admission.waiting) == ([], 2)
        error = d.refused["c"]
        assert isinstance(error, Overloaded)
        assert error.retry_after_s >= 1.0
        assert "2 requests wait for a worker" in error.message
        assert d.noted.reasons == [RejectReason.QUEUE_FULL]
        vars(d.places)[lost] = False
        await d.report(FREE)
        await d.report(FREE)
        assert d.entered == ["a", "b"]


async def test_without_workers_prompts_beyond_the_tokens_held_are_refused() -> None:
    async with door(QueueBounds(requests=10, prompt_tokens=25)) as d:
        d.places.gone = True
        for name in ("a", "b", "c"):
            await d.come(name)
        assert (list(d.refused), d.admission.waiting) == (["c"], 2)
        d.places.gone = False


async def test_who_waits_for_workers_leaves_the_line_with_its_client() -> None:
    async with door() as d:
        d.places.gone = True
        task = await d.come("a")
        task.cancel()
        await d.settle()
        assert d.admission.waiting == 0
        d.places.gone = False


async def test_what_has_begun_is_not_held_when_a_pool_is_lost() -> None:
    async with door() as d:
        d.places.now = (FREE,)
        await d.come("a/0")
        d.places.gone = True
        await d.come("a/1")
        assert d.entered == ["a/0", "a/1"]
        d.places.gone = False


async def test_without_the_other_pool_an_attempt_is_made_in_the_end() -> None:
    async with door(clock=(clock := FakeClock())) as d:
        d.places.half = True
        d.places.now = (FREE,)
        await d.come("a")
        clock.advance(WORKER_WAIT_S)
        await d.report(FREE)
        assert d.entered == ["a"]
        d.places.half = False


async def test_the_whole_line_is_judged_anew_soon_after_a_restart() -> None:
    async with door(clock=SystemClock()) as d:
        d.places.gone = True
        for name in ("a", "b"):
            await d.come(name)
        d.places.gone = False
        d.places.now = ((12.0, 0.5),)
        await until(lambda: len(d.refused) == 2, "both refused, long before the wait is over")


async def test_a_line_waits_while_no_worker_is_there_and_goes_on_one_at_a_time() -> None:
    async with door() as d:
        for name in ("a", "b"):
            await d.come(name)
        d.places.gone = True
        await d.report()
        await d.come("c")
        assert (d.entered, d.admission.waiting) == ([], 3)
        d.places.gone = False
        await d.report(FREE)
        assert (d.entered, d.admission.waiting) == (["a"], 2)


async def test_a_restart_that_the_line_waited_for_is_no_load() -> None:
    async with door(clock=(clock := FakeClock())) as d:
        await d.come("a")
        d.places.gone = True
        await d.report()
        clock.advance(WORKER_WAIT_S - 1)
        d.places.gone = False
        await d.report(BUSY)
        assert (d.refused, d.admission.waiting) == ({}, 1)
        clock.advance(1.0)
        await d.report(BUSY)
        assert isinstance(d.refused["a"], Overloaded)


async def test_a_line_without_workers_for_too_long_is_told_so() -> None:
    async with door(clock=(clock := FakeClock())) as d:
        for name in ("a", "b"):
            await d.come(name)
        d.places.gone = True
        await d.report()
        clock.advance(WORKER_WAIT_S)
        await d.report()
        assert {name: type(error) for name, error in d.refused.items()} == {
            "a": NoWorkers,
            "b": NoWorkers,
        }


async def test_switched_off_everything_is_admitted() -> None:
    async with door(enabled=False) as d:
        d.places.now = ((100.0, 0.5),)
        await d.come("a")
        assert d.entered == ["a"]


# -- over real workers --------------------------------------------------------------------------


def outlooks_of(chooser: Chooser, prompt: Sequence[int]) -> list[Outlook]:
    return [outlook for _, outlook in chooser.consider(prompt, "").outlooks()]


async def test_a_real_workers_report_lets_the_first_in() -> None:
    async with running_cluster(prefill=1, decode=1, gated_prefill=True) as cluster:
        clock, prompt = FakeClock(), make_prompt(40)
        config = RouterConfig()
        chooser = Chooser(cluster.fleet, build_policies(config), clock, Random(0))
        link = cluster.fleet.link(Role.PREFILL, WorkerId("prefill-0"))
        for _ in range(4):
            chooser.learning.prefilled(link, LegTimes(prefill_s=10.0, work=work_alone(0, 100)))
            clock.advance(1.0)
        assert link.view is not None
        link.submit(lambda number: prefill_submit(number, make_prompt(400, 1)), ignore, 400, 400)
        ((queue_s, work_s),) = outlooks_of(chooser, prompt)
        slo = Slo(ttft_s=queue_s / 1.5 + work_s, tpot_s=1.0)
        admission = Admission(chooser, clock, BOUNDS, Unwatched(), ready=lambda: True, local=False)
        cluster.fleet.on_load = admission.look
        progress = Progress(make_request(prompt, deadline_s=600.0), clock)

        async def enter() -> Considered | None:
            async with admission.admitted(progress, SloClass(name="c", slo=slo)) as place:
                return place

        entering = asyncio.create_task(enter())
        await until(lambda: admission.waiting == 1, "a place in the line")
        cluster.prefill[0].gate.open()
        place = await soon(entering)
        assert isinstance(place, Considered)
        assert next(place.outlooks())[1].queue_s < queue_s / 1.5


def ignore(_leg: object, _event: object) -> None:
    """A leg nobody listens to."""


def test_an_unmeasured_kind_has_no_outlook() -> None:
    workers = Workers()
    workers.add("a", queued=1000)
    considered = Considered(workers.prefill(), Decision(WorkerId("a"), ()))
    assert list(considered.outlooks()) == []
