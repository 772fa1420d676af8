"""One placement of one sequence: the order of its hops, from the prefill to the last token.

    choose prefill -> PrefillSubmit -> accepted with a lease
    choose decode  -> DecodeSubmit with that lease, while the prefill runs
    first token    from the prefill worker, at once to the client
    further tokens from the decode worker, once the KV is there
    a migration    hands the running decode leg to another worker (move.py); the client sees a pause

Events are taken as they are heard, in the task that reads the worker's stream: from there to the
client's connection a token meets no queue and wakes no task. The request's own task waits for the
end only.
"""

import asyncio
import logging
from dataclasses import replace
from types import TracebackType
from typing import Self

from core.blocks import join_tokens
from core.clock import Clock
from core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    KvMismatch,
    Overloaded,
    TransferFailed,
    Unavailable,
    WorkerFailed,
    WorkerLost,
    from_code,
)
from core.ids import LeaseId, Role, SequenceId, WorkerId
from core.messages import (
    Accepted,
    DecodeSubmit,
    Handoff,
    LegFailed,
    LegTimes,
    LegTokens,
    Moved,
    Offered,
    PrefillSubmit,
    Rejected,
    Withdraw,
    Withdrawn,
)
from core.stages import Stage
from router.backstops import Answers, Renewal
from router.chooser import Chooser
from router.client import Leg, LegEvent
from router.move import Move, handoff_to
from router.placement import Considered, Placement
from router.progress import Progress
from router.queued import QueuedPrompt
from router.types import (
    Generated,
    MigrationReport,
    PromptRefused,
    Requeued,
    Shut,
    TokenSink,
)

log = logging.getLogger(__name__)


class Attempt:
    """As a block: it begins with the prefill, and leaves no leg open however it ends."""

    def __init__(
        self,
        chooser: Chooser,
        progress: Progress,
        attempt: int,
        shut: Shut,
        clock: Clock,
        *,
        sink: TokenSink,
        answer_s: float = 5.0,
    ) -> None:
        self._answers = Answers(answer_s)
        self._renewal = Renewal()
        self._chooser = chooser
        self._progress = progress
        self._sink = sink
        self._shut = shut
        self._clock = clock
        request = progress.request
        self._sequence_id = SequenceId(request.request_id, request.choice, attempt)
        self._context = join_tokens(request.prompt_tokens, progress.tokens)
        self._output_position = len(progress.tokens)
        loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = loop.create_future()
        self._error: Exception | None = None
        self._prefill: Leg | None = None
        self._decode: Leg | None = None
        self._handoff: Handoff | None = None
        self._queued: QueuedPrompt | None = None
        self._move_to: WorkerId | None = None
        self._early: list[LegTokens] = []
        self._has_first = self._decoding = self._local = False
        self._move: Move | None = None
        self._deadline = loop.call_later(progress.remaining_s, self._expire)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(None)
        self._progress.outcomes.append(self._progress.outcome(error))
        self._deadline.cancel()
        self._renewal.stop()
        self._answers.close()
        self._left_queue()
        if self._move is not None:
            ended = "the request has ended"
            self._move.end(error.message if isinstance(error, BatonError) else ended)
        for open_leg in (self._prefill, self._decode):
            if open_leg is not None:
                open_leg.cancel("the request has ended")
        # A leg knows this attempt as its listener, and an error the frames it came from: left in a
        # circle, all that the request holds would wait for the garbage collector, whose pauses its
        # thousands of objects make long.
        self._prefill = self._decode = self._error = None

    def start(self, considered: Considered | None = None) -> None:
        """Place the prefill, where it was considered just now; all else follows from what the
        workers say. Raises Unavailable.
        """
        self._progress.attempts += 1
        self._progress.mark(Stage.ROUTE)
        alone = None if considered is None else self._chooser.place_locally(considered)
        if alone is not None:
            self._submit_local(alone)
        else:
            self._submit_prefill(considered)

    def _submit_local(self, placed: Placement) -> None:
        """One worker serves it alone. After its no, a prefill worker computes the prompt."""
        progress = self._progress
        progress.prefills_at(placed.link.record)
        progress.decodes_at(placed.link.record)
        self._log_route("route_local", placed)
        progress.mark(Stage.PREFILL, progress.decode_worker)
        self._local = True
        self._decode = self._decode_leg(placed, None)
        self._answers.expect(self._decode, self._give_up)

    def _submit_prefill(self, considered: Considered | None) -> None:
        request, progress = self._progress.request, self._progress
        if considered is not None:
            placed = self._chooser.place(considered, self._shut.failed)
        else:
            placed = self._chooser.for_prefill(self._context, request.cache_salt, self._shut)
        progress.prefills_at(placed.link.record)
        self._log_route("route_prefill", placed)
        progress.mark(Stage.PREFILL, progress.prefill_worker)
        self._prefill = placed.link.submit(
            lambda number: PrefillSubmit(
                number=number,
                sequence_id=self._sequence_id,
                tokens=self._context,
                output_position=self._output_position,
                sampling=request.sampling,
                deadline_s=progress.remaining_s,
                cache_salt=request.cache_salt,
                source=placed.source,
            ),
            self._hear,
            placed.load_tokens,
            placed.prompt_tokens,
        )
        self._answers.expect(self._prefill, self._give_up)
        if placed.queued is not None:
            self._queued = placed.queued
            self._queued.arrived_at_s = progress.arrived_at_s
            self._queued.move = None if progress.requeued else self._withdraw
            self._chooser.queued.add(self._queued)

    async def end(self) -> None:
        """Wait for the last token; raises what ended a leg, or the sink."""
        await self._over
        if self._error is not None:
            raise self._error

    # -- events ---------------------------------------------------------------------------------

    def _hear(self, leg: Leg, event: LegEvent) -> None:
        """The stream's task is not to suffer from what goes wrong with one sequence."""
        if self._over.done():
            return
        try:
            for tokens in self._take(leg, event):
                self._emit(tokens)
            if leg is self._decode:
                self._hear_tokens()
        except Exception as error:  # noqa: BLE001 - raised in the request's task, by `end`
            self._end(error)

    def _hear_token(self, token: int) -> None:
        """One more token of the decode leg, when there is nothing else to see to."""
        try:
            self._progress.emit_one(token)
            self._sink.token(token)
        except Exception as error:  # noqa: BLE001 - raised in the request's task, by `end`
            self._end(error)

    def _hear_tokens(self) -> None:
        """From here on plain tokens of the decode leg need no look at the state of the hops."""
        moving = self._move is not None and not self._move.over
        plain = not moving and not self._over.done() and self._has_first and self._prefill is None
        if self._decode is not None and not self._progress.request.sampling.return_logits:
            self._decode.on_token = self._hear_token if plain else None

    def _end(self, error: Exception | None) -> None:
        """The first end counts; nothing is heard after it."""
        if not self._over.done():
            self._error = error
            self._over.set_result(None)
        if self._decode is not None:
            self._decode.on_token = None

    def _give_up(self, leg: Leg) -> None:
        """No answer to the submit: to be tried elsewhere."""
        if self._over.done():
            return
        worker_id = leg.link.record.worker_id
        self._blame(leg)
        self._end(WorkerLost(f"worker {worker_id} did not take or refuse a sequence in time"))

    def _blame(self, leg: Leg, *, fault: bool = False) -> None:
        record = leg.link.record
        self._shut.failed.add(record.incarnation)
        self._chooser.learning.failed(record.role, record.incarnation, fault=fault)

    def _expire(self) -> None:
        """Whoever the sequence still waited for, for the whole of its time, has failed."""
        if not self._over.done() and self._prefill is not None and not self._has_first:
            self._blame(self._prefill)
        elif not self._over.done() and self._decode is not None and not self._decoding:
            self._blame(self._decode)
        limit_s = self._progress.request.deadline_s
        self._end(DeadlineExceeded(f"the request did not finish within {limit_s:.1f} s"))

    def _take(self, leg: Leg, event: LegEvent) -> list[LegTokens]:
        """The tokens that may now go to the client, in order."""
        if leg is not self._prefill and leg is not self._decode:
            if self._move is not None and leg is self._move.leg:
                self._move.hear_destination(event)
            return []  # or of a leg that was given up, or is needed no more
        match event:
            case Accepted():
                self._answers.came(leg)
                if leg is self._prefill and event.lease_id is not None:
                    self._shut.full.clear()  # the noes before are old when this attempt has failed
                    self._start_decode(leg, event.lease_id, event.lease_s)
                elif leg is self._decode:
                    self._renewal.stop()  # from here on the reader renews
            case Rejected():
                self._answers.came(leg)
                self._rejected(leg, event)
            case LegFailed():
                self._fail(leg, event)
            case LegTokens() if leg is self._prefill:
                return self._first_token(event)
            case LegTokens() if leg is self._decode:
                return self._decoded(event) if self._has_first else self._decoded_first(event)
            case Offered() if self._move is not None:
                self._move.offered(event)
            case Moved():
                return self._moved(leg)
            case Withdrawn() if self._move_to is not None:
                self._answers.came(leg)
                leg.link.finish(leg)
                raise Requeued(self._move_to)
        return []

    def _first_token(self, event: LegTokens) -> list[LegTokens]:
        self._move_to = None  # it has begun: what fails from here on is no withdrawal
        self._left_queue()
        self._prefilled(self._prefill, event)
        if event.finish is None:
            self._progress.mark(Stage.KV_TRANSFER, self._progress.decode_worker)
        ready = [event]
        for early in self._early:
            ready += self._decoded(early)
        return ready

    def _decoded_first(self, event: LegTokens) -> list[LegTokens]:
        """Tokens that came before the prefill's, which they follow; or there is no prefill."""
        if not self._local:
            self._early.append(event)
            return []
        self._prefilled(self._decode, event)
        return self._decoded(replace(event, times=LegTimes()))

    def _prefilled(self, leg: Leg | None, event: LegTokens) -> None:
        self._has_first = True
        self._progress.prefill_times = event.times or LegTimes()
        if leg is not None and event.times is not None:
            self._chooser.learning.prefilled(leg.link, event.times)

    def _decoded(self, event: LegTokens) -> list[LegTokens]:
        progress, move = self._progress, self._move
        if self._prefill is not None:
            # The KV has arrived and its lease is closed: the prefill worker may go now.
            self._prefill.link.finish(self._prefill)
            self._prefill = None
            self._renewal.stop()
        if not self._decoding and self._decode is not None:
            self._decoding = True
            self._chooser.learning.decoding(self._decode.link)
        if move is not None and move.moved:
            move.end("", pause_s=self._clock.now_s() - progress.last_at_s, times=event.times)
        elif event.times is not None:
            progress.decode_times = event.times
            progress.mark(Stage.DECODE, progress.decode_worker)
        if move is not None and not move.moved:
            move.hear_source(event)
        if event.finish is not None and self._decode is not None:
            self._decode.link.finish(self._decode)
            if move is not None:
                move.end("the answer ended first")
        return [event]

    def _rejected(self, leg: Leg, event: Rejected) -> None:
        """A decode worker's no costs only another choice; a prefill worker's, another attempt.
        To an answer that would stay it says nothing of its prompt.
        """
        leg.link.finish(leg)
        error = from_code(event.code, event.message)
        if not self._local or leg.link.record.role is Role.DECODE:
            said_no = self._shut.full if isinstance(error, Overloaded) else self._shut.failed
            said_no.add(leg.link.record.incarnation)
        if self._local and error.retryable:
            self._local, self._decode = False, None
            self._submit_prefill(None)
            return
        if leg is self._prefill and isinstance(error, Overloaded):
            raise PromptRefused(error.message, leg.link.record.worker_id)
        others = leg is self._decode and self._chooser.has_decode(excluding=self._shut.all)
        if not others or not error.retryable:
            raise error
        self._submit_decode()

    def _fail(self, leg: Leg, event: LegFailed) -> None:
        leg.link.finish(leg)
        error = from_code(event.code, event.message)
        if self._move_to is not None and leg is self._decode and isinstance(error, TransferFailed):
            raise Requeued(self._move_to)  # it heard sooner than we that the lease is withdrawn
        fault = isinstance(error, InternalError)
        if fault:
            worker_id = leg.link.record.worker_id
            error = WorkerFailed(f"worker {worker_id} failed: {error.message}", worker_id=worker_id)
        if isinstance(error, Overloaded):  # as a no would have been
            self._shut.full.add(leg.link.record.incarnation)
        elif isinstance(error, Unavailable):
            self._blame(leg, fault=fault)
        if isinstance(error, TransferFailed) and self._handoff is not None:
            # Either end may be at fault; the one that is not has successes with others.
            self._chooser.learning.failed(Role.PREFILL, self._handoff.owner_incarnation)
        if isinstance(error, KvMismatch) and self._handoff is not None:
            # It may be wrong there already.
            self._shut.failed.add(self._handoff.owner_incarnation)
        raise error

    def _emit(self, tokens: LegTokens) -> None:
        progress = self._progress
        progress.emit(tokens.tokens)
        progress.finished = tokens.finish is not None
        self._sink.take(
            Generated(
                tokens=tokens.tokens,
                finish=tokens.finish,
                cached_tokens=progress.cached_tokens,
                timings=progress.timings() if tokens.finish is not None else None,
                logits=tokens.logits,
            )
        )
        if progress.finished:
            self._end(None)

    # -- hops -----------------------------------------------------------------------------------

    def _start_decode(self, prefill: Leg, lease_id: LeaseId, lease_s: float) -> None:
        self._handoff = handoff_to(prefill.link, lease_id)
        if self._handoff is None:
            return  # its loss has ended this attempt, or is about to
        self._renewal.start(prefill, lease_id, lease_s)
        if self._output_position + 1 < self._progress.request.sampling.max_tokens:
            self._submit_decode()

    def _submit_decode(self) -> None:
        address = self._handoff.owner_address if self._handoff is not None else ""
        placed = self._chooser.for_decode(
            len(self._context), self._total_tokens, self._shut.all, kv_address=address
        )
        self._progress.decodes_at(placed.link.record)
        self._log_route("route_decode", placed)
        self._decode = self._decode_leg(placed, self._handoff)
        self._answers.expect(self._decode, self._give_up)

    def _decode_leg(self, placed: Placement, handoff: Handoff | None) -> Leg:
        """Raises WorkerLost."""
        request = self._progress.request
        return placed.link.submit(
            lambda number: DecodeSubmit(
                number=number,
                sequence_id=self._sequence_id,
                tokens=self._context,
                output_position=self._output_position,
                sampling=request.sampling,
                deadline_s=self._progress.remaining_s,
                handoff=handoff,
                cache_salt=request.cache_salt,
            ),
            self._hear,
            placed.load_tokens,
            placed.prompt_tokens,
        )

    @property
    def _total_tokens(self) -> int:
        """What the sequence may grow to."""
        left = self._progress.request.sampling.max_tokens - self._output_position
        return len(self._context) + left

    def _log_route(self, event: str, placed: Placement) -> None:
        """One line explains the choice, where it is asked for: it costs as much as the choice."""
        if log.isEnabledFor(logging.DEBUG):
            request_id = self._progress.request.request_id
            log.debug("%s request_id=%s %s", event, request_id, placed.decision.explain())

    # -- a prompt that has not begun ------------------------------------------------------------

    def _withdraw(self, to: WorkerId) -> None:
        """Move to another prefill worker, if this one has not begun: it answers only then."""
        if self._prefill is not None and not self._has_first and not self._over.done():
            self._move_to = to
            self._prefill.link.send(Withdraw(number=self._prefill.number))

    def _left_queue(self) -> None:
        if self._queued is not None:
            self._chooser.queued.discard(self._queued)
            self._queued = None

    # -- a migration ----------------------------------------------------------------------------

    async def migrate(self, to: WorkerId | None, timeout_s: float) -> MigrationReport:
        """See router.types.Generator."""
        source = self._decode
        if source is None or self._progress.finished:
            raise InvalidRequest("no decode worker runs this sequence now", param="request_id")
        if self._move is not None and not self._move.over:
            raise InvalidRequest("this sequence is on its way already", param="request_id")
        incarnation = source.link.record.incarnation
        context_tokens = len(self._progress.request.prompt_tokens) + len(self._progress.tokens)
        placed = self._chooser.for_move(context_tokens, self._total_tokens, incarnation, to)
        self._log_route("route_migration", placed)
        move = self._move = Move(source, placed, self._decode_leg, self._clock)
        source.on_token = None
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(move.report)
        except TimeoutError:
            move.end(f"it was not done within {timeout_s:g} s")
            return await move.report
        finally:
            move.end("its caller went away")

    def _moved(self, source: Leg) -> list[LegTokens]:
        """The source has let go. Raises TransferFailed if nobody has caught."""
        source.link.finish(source)
        move, progress = self._move, self._progress
        if move is None or move.leg is None or move.over:
            raise TransferFailed("the sequence moved, but its new worker has lost it")
        move.moved = True
        self._decode = move.leg
        progress.migrations += 1
        progress.decodes_at(move.leg.link.record)
        progress.mark(Stage.DECODE, progress.decode_worker)
        return [tokens for early in move.early for tokens in self._take(move.leg, early)]
