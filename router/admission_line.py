"""The line of those who wait for a place, as admission.py judges them: in order, in bounds.

A worker's report, or one that comes or goes, makes the first of it look again.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from core.clock import Clock
from core.errors import DeadlineExceeded, NoWorkers, Overloaded
from core.ids import RequestId
from router.admission import (
    LEAST_RETRY_S,
    Admit,
    InLine,
    Longs,
    QueueBounds,
    Reject,
    Verdict,
    Wait,
    decide_decode,
    is_full,
    is_late,
    judge,
)
from router.chooser import Chooser
from router.config import DecodeAdmission
from router.line import Line
from router.placement import Considered
from router.policies.base import Slo
from router.progress import Progress
from router.watcher import FlowWatcher, RejectReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SloClass:
    """Requests that share targets and a line: first come, first served at each worker."""

    name: str
    slo: Slo


class _Asking:
    """One sequence that wants to be placed. `wake` makes it look again, once it is in line.

    Its time begins here: a restart that it has waited for, before or since, is no load. `gap_s` is
    what all such gaps had taken when it came.
    """

    __slots__ = ("came_s", "gap_s", "late", "progress", "slo_class", "waiting", "wake")

    def __init__(self, progress: Progress, slo_class: SloClass, now_s: float, gap_s: float) -> None:
        self.gap_s = gap_s
        self.progress = progress
        self.slo_class = slo_class
        self.came_s = now_s
        self.waiting = InLine.of(None)
        self.late = False
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
        self._lines: dict[str, Line[_Asking]] = defaultdict(Line)
        self._longs: dict[str, Longs] = defaultdict(Longs)
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
            _wake(line)

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
        line.append(asking, late=asking.late)
        self._hold(asking)
        try:
            while True:
                asking.wake.clear()
                considered, verdict = self._judge(asking, considered)
                if isinstance(verdict, Admit):
                    return considered
                if isinstance(verdict, Reject):
                    raise self._refusal(verdict, asking.slo_class)
                await _either(asking.wake, min(verdict.recheck_s, asking.progress.remaining_s))
        finally:
            was_next = line.next is asking
            line.remove(asking)
            self._let_go(asking)
            if was_next:
                # Its task runs after this one, which submits its prompt before it waits again.
                _wake(line)

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
            return before, Wait(min(left_s, asking.slo_class.slo.ttft_s / 2), LEAST_RETRY_S)
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
        longs = self._longs[asking.slo_class.name]
        if before is None and request.choice == 0:
            longs.saw(considered, asking.slo_class.slo)
        now_s = self._clock.now_s()
        came_s = asking.came_s + self._gap.until(now_s) - asking.gap_s
        if line:  # else there is nobody to be sorted among, and to look at all places costs more
            asking.waiting = InLine.of(considered)
            self._sort(asking, line, now_s - came_s)
        verdict = judge(
            now_s,
            came_s,
            considered,
            asking.slo_class.slo,
            [other.waiting for other in line.ahead_of(asking, late=asking.late)],
            give_way=longs.give_way,
        )
        if isinstance(verdict, Admit):
            verdict = decide_decode(self._chooser.decode_load(considered, self._decode))
        return considered, verdict

    def _sort(self, asking: _Asking, line: Line[_Asking], waited_s: float) -> None:
        """Whether it is late changes with what it has waited, and with what is cached."""
        asking.late = is_late(waited_s, asking.waiting.work_s, asking.slo_class.slo)
        if line.move(asking, late=asking.late):
            _wake(line)

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
        return is_full(
            self.waiting,
            self._held_tokens,
            asking.prompt_tokens,
            self._bounds,
            late=asking.late,
        )

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


def _wake(line: Line[_Asking]) -> None:
    if (first := line.next) is not None:
        first.wake.set()


async def _either(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event, or so long."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
