"""One sequence as flow.py follows it over all its attempts, and what observers hear at its end.

Spans and metrics come from here, once per sequence: no token pays for them.
"""

import asyncio
import logging
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from core import telemetry
from core.clock import Clock
from core.errors import BatonError, Cancelled, InternalError
from core.ids import Incarnation, Role
from core.messages import LegTimes
from core.registry import WorkerRecord
from core.stages import Stage
from router.types import Enough, GenerateRequest, Timings

log = logging.getLogger(__name__)

OK = "ok"
"""The outcome of what came to its finish."""
COMPLETE = frozenset({OK, Enough.code})
"""Outcomes of answers that are whole: of the second kind a stop string ended, in the router."""
_NO_TIMES = LegTimes()


class Mark(NamedTuple):
    """A stage began, at this monotonic time; it ends where the next mark is, or with the sequence.

    `worker_id` is the worker it waits for, empty where that is the router.
    """

    stage: Stage
    at_s: float
    attempt: int
    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceEnd:
    """How one sequence went. An outcome is one of COMPLETE, or the code of what ended it."""

    request: GenerateRequest
    outcome: str
    attempts: tuple[str, ...]
    """The outcome of each attempt."""
    marks: tuple[Mark, ...]
    """In order of time; the first is ADMIT."""
    ended_at_s: float
    timings: Timings
    output_tokens: int
    served_by: tuple[Incarnation, ...] = ()
    """The lives of the two workers in `timings`, or of the one that was both; of those, since, one
    may have ended, and another have begun under the same name."""


class SequenceObserver(Protocol):
    """Called once for every sequence, on the event loop; must neither wait nor raise."""

    def ended(self, end: SequenceEnd) -> None: ...


class Progress:
    """What the client has of one sequence, and where its time went."""

    def __init__(self, request: GenerateRequest, clock: Clock) -> None:
        self.request = request
        self._clock = clock
        self.arrived_at_s = self.first_at_s = self.last_at_s = clock.now_s()
        self.tokens: list[int] = []
        self.finished = False
        self.attempts = 0
        self.migrations = 0
        self.requeued = False
        """Its prompt was moved from one prefill worker to another before it had begun."""
        self.workerless_s = 0.0
        """Of its time, what it has waited while a pool had no worker."""
        self.outcomes: list[str] = []
        self.prefill_worker = self.decode_worker = ""
        self._lives: dict[Role, Incarnation] = {}
        self.prefill_times = self.decode_times = _NO_TIMES
        self.marks: list[Mark] = []
        self._final: Timings | None = None
        self.mark(Stage.ADMIT)

    @property
    def remaining_s(self) -> float:
        return self.arrived_at_s + self.request.deadline_s - self._clock.now_s()

    @property
    def cached_tokens(self) -> int:
        """Of the prompt; a continuation may find tokens of the answer cached as well."""
        return min(self.prefill_times.cached_tokens, len(self.request.prompt_tokens))

    def prefills_at(self, worker: WorkerRecord) -> None:
        """A leg is on its way there."""
        self.prefill_worker = worker.worker_id
        self._lives[Role.PREFILL] = worker.incarnation

    def decodes_at(self, worker: WorkerRecord) -> None:
        """Likewise."""
        self.decode_worker = worker.worker_id
        self._lives[Role.DECODE] = worker.incarnation

    def mark(self, stage: Stage, worker_id: str = "") -> None:
        """The stage begins now."""
        attempt, at_s = max(0, self.attempts - 1), self._clock.now_s()
        self.marks.append(Mark(stage, at_s, attempt, worker_id))

    def emit(self, tokens: tuple[int, ...]) -> None:
        """These go to the client now."""
        self.last_at_s = self._clock.now_s()
        if not self.tokens:
            self.first_at_s = self.last_at_s
        self.tokens.extend(tokens)

    def emit_one(self, token: int) -> None:
        """As `emit`, for one that is not the first."""
        self.last_at_s = self._clock.now_s()
        self.tokens.append(token)

    def timings(self) -> Timings:
        """Up to now; complete, and made once, when the last token is out."""
        if self._final is not None:
            return self._final
        timings = self._timings()
        if self.finished:
            self._final = timings
        return timings

    def _timings(self) -> Timings:
        gaps = max(1, len(self.tokens) - 1)
        decode_s = self.last_at_s - self.first_at_s
        return Timings(
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            attempts=self.attempts,
            queue_s=self.prefill_times.queue_s,
            prefill_s=self.prefill_times.prefill_s,
            ttft_s=self.first_at_s - self.arrived_at_s,
            transfer_s=self.decode_times.transfer_s,
            transfer_bytes=self.decode_times.transfer_bytes,
            transfer_blocks=self.decode_times.transfer_blocks,
            transfer_descriptors=self.decode_times.transfer_descriptors,
            transfer_hidden_s=self.decode_times.transfer_hidden_s,
            decode_s=decode_s,
            tpot_s=decode_s / gaps,
            cached_tokens=self.cached_tokens,
            fetched_tokens=self.prefill_times.fetched_tokens,
            fetched_bytes=self.prefill_times.transfer_bytes,
            migrations=self.migrations,
        )

    def outcome(self, error: BaseException | None) -> str:
        """What `error`, which leaves the sequence or an attempt, makes of it.

        Whoever has the last token may close the generator instead of asking for more.
        """
        if self.finished or error is None:
            return OK
        if isinstance(error, BatonError):
            return error.code
        cancelled = isinstance(error, GeneratorExit | asyncio.CancelledError)
        return Cancelled.code if cancelled else InternalError.code

    def end(self, error: BaseException | None) -> SequenceEnd:
        return SequenceEnd(
            request=self.request,
            outcome=self.outcome(error),
            attempts=tuple(self.outcomes),
            marks=tuple(self.marks),
            ended_at_s=self._clock.now_s(),
            timings=self.timings(),
            output_tokens=len(self.tokens),
            served_by=tuple(dict.fromkeys(self._lives.values())),
        )


class Observed:
    """A block around all of a sequence: however it is left, the observers hear of it."""

    def __init__(self, progress: Progress, observers: tuple[SequenceObserver, ...]) -> None:
        self._progress = progress
        self._observers = observers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = self._progress.end(error)
        for observer in self._observers:
            try:
                observer.ended(end)
            except Exception:  # what is counted must not change what the client gets
                line = telemetry.log_line("observer_failed", request_id=end.request.request_id)
                log.exception("%s", line)
