"""Whether a request is placed now, waits in the router, or is refused at once, by its TTFT target.

A request that has waited `w` and whose prompt is `work` on a worker with `queue` before it has its
first token after w + queue + work. Only waiting is overload, the work is not: a prompt whose own
work is more than the target is served all the same. So what is bounded is w + queue, by

    patience = max(target - work, target / 2, work)

which keeps the target wherever a prompt leaves half of it for waiting, and lets a longer one wait
as long as it computes. Over all candidates the policy looked at:

    admit    w + queue      <= patience on one of them
    wait     w + queue / 2  <= patience on one of them: a queue may drain twice as fast as predicted
    reject   otherwise; where no prediction is wrong by more than that, waiting was for nothing

Those who wait stand in a line, and only the first is admitted, or whoever would go to a worker that
none of those before it wants.

Whoever is admitted by its TTFT may still be refused because no decode worker could keep its TPOT
target (`router.admission_decode`; decode_load.py): that does not wait, as answers take long to end.

An idle worker admits whoever has not outwaited its patience, so a prediction that is far too high
corrects itself. Whoever comes while a pool has no worker waits in the same bounded line: a restart
gathers no crowd. Late binding and early rejection are those of Mooncake (FAST'25, section 5.2) and
P/D-Serve (arXiv 2408.08147).
"""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from math import inf
from typing import NamedTuple, Self

from core.clock import Clock
from core.errors import DeadlineExceeded, NoWorkers, Overloaded
from core.ids import RequestId, WorkerId
from router.chooser import Chooser
from router.config import DecodeAdmission
from router.decode_load import DecodeLoad
from router.members import L
from router.placement import Considered, Outlook
from router.policies.base import Slo
from router.progress import Progress
from router.watcher import FlowWatcher, RejectReason

_DRAIN_DOUBT = 0.5
"""Part of a predicted queue that may be gone sooner: legs are cancelled, prompts found cached."""
_AIM = 0.8
"""Of the TTFT target: one prediction in ten is a fifth too short."""
_LEAST_RETRY_S = 1.0
_MOST_RETRY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """Requests that share targets and a line: first come, first served at each worker."""

    name: str
    slo: Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueBounds:
    """Of what waits in one router, all classes together; a request of many choices is one."""

    requests: int
    prompt_tokens: int


class InLine(NamedTuple):
    """One in line: the least seconds of work it is anywhere, and the workers it may go to; None
    where that is not known yet.
    """

    work_s: float
    workers: Collection[WorkerId] | None

    @classmethod
    def of(cls, considered: Considered[L] | None) -> Self:
        """As it was considered last; None is for what found a pool without workers."""
        if considered is None:
            return cls(0.0, None)
        outlooks = dict(considered.outlooks())
        work_s = min((outlook.work_s for outlook in outlooks.values()), default=0.0)
        return cls(work_s, frozenset(outlooks) | {considered.worker_id})

    def would_go_to(self, worker: WorkerId) -> bool:
        """Whether a prompt that goes there may be in its way."""
        return self.workers is None or worker in self.workers


class Admit(NamedTuple):
    """Place it now."""


class Wait(NamedTuple):
    """Place it later. If the prediction stays as it is, the answer is another one `recheck_s` from
    now; `drain_s` as a Reject's `retry_after_s`.
    """

    recheck_s: float
    drain_s: float


class Reject(NamedTuple):
    """A request like it would be admitted after `retry_after_s`."""

    retry_after_s: float
    reason: RejectReason = RejectReason.TARGET


Verdict = Admit | Wait | Reject


def judge(
    now_s: float,
    arrived_s: float,
    considered: Considered[L],
    slo: Slo,
    ahead: Sequence[InLine],
) -> Verdict:
    """Of one that comes, or one in line, with those before it there. It passes them where none of
    them would go: a long prompt that waits for a prefill worker holds up no turn of a chat whose
    decode worker has it all but for a question.
    """
    if not ahead:
        return decide(now_s, arrived_s, (outlook for _, outlook in considered.outlooks()), slo)
    outlooks = dict(considered.outlooks())
    here = considered.worker_id
    if here in outlooks and not any(other.would_go_to(here) for other in ahead):
        verdict = decide(now_s, arrived_s, [outlooks[here]], slo)
        if isinstance(verdict, Admit):
            return verdict
    ahead_s = sum(other.work_s for other in ahead) / considered.places
    return decide(now_s, arrived_s, outlooks.values(), slo, ahead_s=ahead_s)


def decide(
    now_s: float,
    arrived_s: float,
    outlooks: Iterable[Outlook],
    slo: Slo,
    *,
    ahead_s: float | None = None,
) -> Verdict:
    """`ahead_s` are seconds of work, spread over the pool, of those before it in its line; None is
    for the first, as only that one is admitted.

    Without an outlook nothing is predicted, and the first is admitted whatever it is.
    """
    waited_s = now_s - arrived_s
    latest_s, after_s = -inf, inf
    for queue_s, work_s in outlooks:
        patience_s = patience_of(work_s, slo)
        before_s = queue_s + (ahead_s or 0.0)
        if ahead_s is None and waited_s + before_s <= patience_s:
            return Admit()
        latest_s = max(latest_s, patience_s - waited_s - (1 - _DRAIN_DOUBT) * before_s)
        after_s = min(after_s, before_s - patience_s)
    if after_s == inf:
        return Admit() if ahead_s is None else Wait(slo.ttft_s, _LEAST_RETRY_S)
    drain_s = min(max(_LEAST_RETRY_S, after_s), _MOST_RETRY_S)
    return Wait(latest_s, drain_s) if latest_s > 0 else Reject(drain_s)


def decide_decode(load: DecodeLoad | None) -> Verdict:
    """Of a prompt that its TTFT admits: whether there is a decode worker for it. Where nothing is
    predicted, there is.
    """
    if load is None or load.share <= 1.0:
        return Admit()
    return Reject(min(max(_LEAST_RETRY_S, load.drain_s), _MOST_RETRY_S), RejectReason.DECODE)


def is_full(requests: int, waiting_tokens: int, prompt_tokens: int, bounds: QueueBounds) -> bool:
    """Whether a prompt may not wait beside so many requests of so many tokens; an empty queue takes
    any.
    """
    over_tokens = waiting_tokens + prompt_tokens > bounds.prompt_tokens
    return requests > 0 and (requests >= bounds.requests or over_tokens)


def patience_of(work_s: float, slo: Slo) -> float:
    """How long a prompt that takes `work_s` itself may wait, here and at its worker."""
    return max(_AIM * slo.ttft_s - work_s, slo.ttft_s / 2, work_s)


class _Asking:
    """One sequence that wants to be placed. `wake` makes it look again, once it is in line.

    Its time begins here: a restart that it has waited for, before or since, is no load. `gap_s` is
    what all such gaps had taken when it came.
    """

    __slots__ = ("came_s", "gap_s", "progress", "slo_class", "waiting", "wake")

    def __init__(self, progress: Progress, slo_class: SloClass, now_s: float, gap_s: float) -> None:
        self.gap_s = gap_s
        self.progress = progress
        self.slo_class = slo_class
        self.came_s = now_s
        self.waiting = InLine.of(None)
        self.wake = asyncio.Event()

    @property
    def request_id(self) -> RequestId:
        return self.progress.request.request_id

    @property
    def prompt_tokens(self) -> int:
        return len(self.progress.request.prompt_tokens)


class _Gap:
    """Time in which a pool had no worker, as far as those who came have noticed."""

    def __init__(self) -> None:
        self.total_s = 0.0
        """Of those that have ended."""
        self._since_s: float | None = None

    def begin(self, now_s: float) -> None:
        """There is none, perhaps still."""
        if self._since_s is None:
            self._since_s = now_s

    def end(self, now_s: float) -> None:
        """There is one, perhaps again."""
        self.total_s = self.until(now_s)
        self._since_s = None

    def until(self, now_s: float) -> float:
        """As `total_s`, with the one that has not ended."""
        return self.total_s + (0.0 if self._since_s is None else now_s - self._since_s)


class Admission:
    """The lines of one router. Only the first of a line looks for a place when a report comes; who
    stands behind it looks once as it comes, and then at its timer.
    """

    def __init__(
        self,
        chooser: Chooser,
        clock: Clock,
        bounds: QueueBounds,
        watcher: FlowWatcher,
        *,
        ready: Callable[[], bool],
        enabled: bool = True,
        decode: DecodeAdmission = "off",
        local: bool = True,
        worker_wait_s: float = 15.0,
    ) -> None:
        """`ready`: every pool has a worker that takes requests. Not `enabled`: only those who find
        it otherwise are held.
        """
        self._ready = ready
        self._worker_wait_s = worker_wait_s
        self._gap = _Gap()
        self._local = local
        self._chooser = chooser
        self._clock = clock
        self._bounds = bounds
        self._watcher = watcher
        self._enabled = enabled
        self._decode = decode
        self._lines: dict[str, deque[_Asking]] = defaultdict(deque)
        self._started: Counter[RequestId] = Counter()
        self._held: Counter[RequestId] = Counter()
        """Choices in all lines, by request."""
        self._held_tokens = 0
        """Of the prompts of those requests."""

    @property
    def waiting(self) -> int:
        """Requests in all lines."""
        return len(self._held)

    def look(self) -> None:
        """A worker has reported, or one came or left: the first of each line may find a place."""
        for line in self._lines.values():
            if line:
                line[0].wake.set()

    @asynccontextmanager
    async def admitted(
        self, progress: Progress, slo_class: SloClass
    ) -> AsyncIterator[Considered | None]:
        """A block around all attempts of a sequence. Enters with the place found for its prefill,
        which holds until the next `await`; None leaves the choice to the attempt.

        It waits while a pool has no worker, up to `worker_wait_s` in all; then it gets NoWorkers,
        or whatever its attempt does without that pool.

        Raises Overloaded, NoWorkers and DeadlineExceeded. Once one choice of a request has entered,
        its others are not refused: the client may have tokens of it.
        """
        request_id = progress.request.request_id
        now_s = self._clock.now_s()
        considered = await self._admit(_Asking(progress, slo_class, now_s, self._gap.until(now_s)))
        if considered is not None:
            self._watcher.placed(considered.local.verdict)
        self._started[request_id] += 1
        try:
            yield considered
        finally:
            self._started[request_id] -= 1
            if not self._started[request_id]:
                del self._started[request_id]

    async def _admit(self, asking: _Asking) -> Considered | None:
        considered, verdict = self._judge(asking, None)
        if isinstance(verdict, Wait) and self._full(asking):
            verdict = Reject(verdict.drain_s, RejectReason.QUEUE_FULL)
        if isinstance(verdict, Wait):
            considered = await self._wait(asking, considered)
        elif isinstance(verdict, Reject):
            raise self._refusal(verdict, asking.slo_class)
        now_s = self._clock.now_s()
        asking.progress.workerless_s = self._gap.until(now_s) - asking.gap_s
        self._watcher.admitted(now_s - asking.came_s)
        return considered

    async def _wait(self, asking: _Asking, considered: Considered | None) -> Considered | None:
        """In line until there is a place. Raises Overloaded, NoWorkers and DeadlineExceeded."""
        line = self._lines[asking.slo_class.name]
        line.append(asking)
        self._hold(asking)
        try:
            while True:
                asking.wake.clear()
                asking.waiting = InLine.of(considered)
                considered, verdict = self._judge(asking, considered)
                if isinstance(verdict, Admit):
                    return considered
                if isinstance(verdict, Reject):
                    raise self._refusal(verdict, asking.slo_class)
                await _either(asking.wake, min(verdict.recheck_s, asking.progress.remaining_s))
        finally:
            was_first = line[0] is asking
            line.remove(asking)
            self._let_go(asking)
            if was_first and line:
                # Its task runs after this one, which submits its prompt before it waits again.
                line[0].wake.set()

    def _judge(
        self, asking: _Asking, before: Considered | None
    ) -> tuple[Considered | None, Verdict]:
        """Of one in line, or one that comes, and the place it would get now.

        `before` is what was considered for it last time. Raises NoWorkers and DeadlineExceeded.
        """
        request, line = asking.progress.request, self._lines[asking.slo_class.name]
        if asking.progress.remaining_s <= 0:
            raise DeadlineExceeded("the request's time is up, and no worker was free in time")
        started = request.request_id in self._started
        left_s = self._gap_left_s(asking)
        if left_s > 0 and not started:
            # Those in line look again soon after the gap, each in its time and not all at once.
            return before, Wait(min(left_s, asking.slo_class.slo.ttft_s / 2), _LEAST_RETRY_S)
        total_tokens = len(request.prompt_tokens) + request.sampling.max_tokens
        try:
            considered = self._chooser.consider(
                request.prompt_tokens,
                request.cache_salt,
                hashes=None if before is None else before.query.hashes,
                local_total=total_tokens if self._local else None,
            )
        except NoWorkers:
            if not started:
                raise
            return None, Admit()  # the attempt's to wait for, or to fail with
        if not self._enabled or started:
            return considered, Admit()
        now_s = self._clock.now_s()
        verdict = judge(
            now_s,
            asking.came_s + self._gap.until(now_s) - asking.gap_s,
            considered,
            asking.slo_class.slo,
            [other.waiting for other in takewhile(lambda other: other is not asking, line)],
        )
        if isinstance(verdict, Admit):
            verdict = decide_decode(self._chooser.decode_load(considered, self._decode))
        return considered, verdict

    def _gap_left_s(self, asking: _Asking) -> float:
        """How much longer it may wait for a pool that has no worker; 0 where it need not."""
        now_s = self._clock.now_s()
        if self._ready():
            self._gap.end(now_s)
            return 0.0
        self._gap.begin(now_s)
        return self._worker_wait_s - (self._gap.until(now_s) - asking.gap_s)

    def _hold(self, asking: _Asking) -> None:
        if asking.request_id not in self._held:
            self._held_tokens += asking.prompt_tokens
        self._held[asking.request_id] += 1
        self._watcher.queued(self.waiting)

    def _let_go(self, asking: _Asking) -> None:
        self._held[asking.request_id] -= 1
        if not self._held[asking.request_id]:
            del self._held[asking.request_id]
            self._held_tokens -= asking.prompt_tokens
        self._watcher.queued(self.waiting)

    def _full(self, asking: _Asking) -> bool:
        """A request that waits already does so with all of its choices."""
        if asking.request_id in self._held:
            return False
        return is_full(self.waiting, self._held_tokens, asking.prompt_tokens, self._bounds)

    def _refusal(self, verdict: Reject, slo_class: SloClass) -> Overloaded:
        self._watcher.rejected(verdict.reason)
        slo = slo_class.slo
        text = {
            RejectReason.TARGET: f"the first token would miss its target of {slo.ttft_s:g} s; try"
            " again later (slo.ttft_ms sets the target, router.admission switches this)",
            RejectReason.DECODE: "no decode worker has room for the answer, or could give its"
            f" tokens within {1e3 * slo.tpot_s:g} ms each; try again later (slo.tpot_ms sets the"
            " target, router.admission_decode switches this)",
            RejectReason.QUEUE_FULL: f"{self.waiting} requests wait for a worker, and no more may;"
            " try again later (router.admission_max_requests and router.admission_max_tokens bound"
            " them)",
        }
        return Overloaded(text[verdict.reason], retry_after_s=verdict.retry_after_s)


async def _either(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event, or so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
