"""The order of a request's hops. No other file knows both workers of a sequence.

    attempt:  choose prefill -> PrefillSubmit -> accepted with a lease
              choose decode  -> DecodeSubmit with that lease, while the prefill runs
              first token    from the prefill worker, at once to the client
              further tokens from the decode worker, once the KV is there

When a leg fails, the other one is cancelled at once, and the next attempt continues elsewhere from
prompt + tokens so far: sampling depends on seed and position alone, so the client sees a pause and
the same text. Attempt numbers fence: what an older attempt still says reaches nobody.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from random import Random

from core.blocks import chain_hashes, root_hash
from core.clock import Clock
from core.errors import (
    DeadlineExceeded,
    NoWorkers,
    Unavailable,
    from_code,
)
from core.ids import BlockHash, Incarnation, LeaseId, Role, SequenceId
from core.messages import (
    Accepted,
    DecodeSubmit,
    Handoff,
    LegFailed,
    LegTimes,
    LegTokens,
    PrefillSubmit,
    Rejected,
    RenewLeases,
)
from core.stages import Stage
from router.client import Leg, LegEvent, WorkerLink
from router.config import RouterConfig
from router.fleet import Fleet
from router.place import Placement, place_decode, place_prefill
from router.policies.base import DecodePolicy, PrefillPolicy
from router.spans import SpanRecorder
from router.types import Generated, GenerateRequest, ServingLimits, Timings, WorkerView

log = logging.getLogger(__name__)

_RETRY_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """Who decides where a sequence goes."""

    prefill: PrefillPolicy
    decode: DecodePolicy


class Flow:
    """Implements router.types.Generator over the workers of a Fleet."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        policies: Policies,
        config: RouterConfig,
        clock: Clock,
        random: Random,
        spans: SpanRecorder,
    ) -> None:
        self._fleet = fleet
        self._policies = policies
        self._config = config
        self._clock = clock
        self._random = random
        self._spans = spans

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Generated, None]:
        """Yield tokens until the finish; see router.types.Generator."""
        progress = _Progress(request, self._clock.now_s())
        failed: set[Incarnation] = set()
        for attempt in range(self._config.max_attempts):
            hops = _Attempt(self, progress, attempt, failed)
            try:
                async with aclosing(hops.run()) as generated:
                    async for item in generated:
                        yield item
                self._spans.record(progress.request.request_id, progress.marks, progress.timings())
                return
            except Unavailable as error:
                last = attempt + 1 == self._config.max_attempts
                log.warning(
                    "attempt_failed request_id=%s attempt=%d code=%s retry=%s reason=%s",
                    request.request_id,
                    attempt,
                    error.code,
                    not last,
                    error.message,
                )
                if last or progress.remaining_s(self._clock.now_s()) <= _RETRY_PAUSE_S:
                    raise
            await asyncio.sleep(_RETRY_PAUSE_S * attempt)

    def limits(self) -> ServingLimits:
        views = [link.view for link in self._fleet.links() if link.view is not None]
        return ServingLimits(
            context_tokens=min((view.capacity_tokens for view in views), default=0),
            ready=all(self._fleet.routable(role) for role in Role),
        )

    def workers(self) -> tuple[WorkerView, ...]:
        return tuple(_describe(link) for link in self._fleet.links())

    # -- placement ------------------------------------------------------------------------------

    def place_prefill(
        self, tokens: list[int], hashes: list[BlockHash], failed: set[Incarnation]
    ) -> Placement:
        """Choose a prefill worker; those that failed this request only if there is no other."""
        return place_prefill(
            self._candidates(Role.PREFILL, failed),
            len(tokens),
            hashes,
            self._policies.prefill,
            self._random,
        )

    def place_decode(self, total_tokens: int, failed: set[Incarnation]) -> Placement:
        """Choose a decode worker, likewise."""
        return place_decode(
            self._candidates(Role.DECODE, failed),
            total_tokens,
            self._policies.decode,
            self._random,
        )

    def _candidates(self, role: Role, failed: set[Incarnation]) -> list[WorkerLink]:
        links = self._fleet.routable(role, excluding=failed)
        links = links or self._fleet.routable(role)
        if not links:
            raise NoWorkers(f"no {role} worker is ready; try again, or see `baton status`")
        return links

    def hashes(self, tokens: list[int], cache_salt: str) -> list[BlockHash]:
        """Block hashes of a prompt, in the block size all workers of the model share."""
        views = [link.view for link in self._fleet.links() if link.view is not None]
        if not views:
            return []
        hello = views[0].hello
        root = root_hash(hello.model_id, cache_salt)
        return chain_hashes(tokens, hello.layout.block_size, root)

    @property
    def clock(self) -> Clock:
        return self._clock


class _Progress:
    """What the client has of one sequence, over all attempts."""

    def __init__(self, request: GenerateRequest, now_s: float) -> None:
        self.request = request
        self.arrived_at_s = now_s
        self.tokens: list[int] = []
        self.attempts = 0
        self.prefill_worker = self.decode_worker = ""
        self.prefill_times = LegTimes()
        self.decode_times = LegTimes()
        self.marks: dict[Stage, float] = {Stage.ADMIT: now_s}
        self.first_at_s = self.last_at_s = now_s

    def remaining_s(self, now_s: float) -> float:
        return self.arrived_at_s + self.request.deadline_s - now_s

    def emit(self, tokens: tuple[int, ...], now_s: float) -> None:
        if not self.tokens:
            self.first_at_s = now_s
            self.marks[Stage.KV_TRANSFER] = now_s
        self.last_at_s = now_s
        self.tokens.extend(tokens)

    def timings(self) -> Timings:
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
            decode_s=decode_s,
            tpot_s=decode_s / gaps,
            cached_tokens=self.prefill_times.cached_tokens,
        )


class _Attempt:
    """One placement of one sequence. Both legs' events meet in one inbox and are taken in order."""

    def __init__(
        self, flow: Flow, progress: _Progress, attempt: int, failed: set[Incarnation]
    ) -> None:
        self._flow = flow
        self._progress = progress
        self._failed = failed
        self._sequence_id = SequenceId(
            progress.request.request_id, progress.request.choice, attempt
        )
        self._context = [*progress.request.prompt_tokens, *progress.tokens]
        self._output_position = len(progress.tokens)
        self._inbox: asyncio.Queue[tuple[Leg, LegEvent]] = asyncio.Queue()
        self._prefill: Leg | None = None
        self._decode: Leg | None = None
        self._handoff: Handoff | None = None
        self._lease_s = 0.0
        self._early: list[LegTokens] = []
        self._has_first = False

    async def run(self) -> AsyncGenerator[Generated, None]:
        """From placement to the finish; raises what ended a leg. Always leaves no leg open."""
        self._progress.attempts += 1
        try:
            self._start_prefill()
            finished = False
            while not finished:
                leg, event = await self._next()
                for tokens in self._take(leg, event):
                    finished = tokens.finish is not None
                    yield self._emit(tokens)
        finally:
            for open_leg in (self._prefill, self._decode):
                if open_leg is not None:
                    open_leg.cancel("the request has ended")

    # -- events ---------------------------------------------------------------------------------

    def _take(self, leg: Leg, event: LegEvent) -> list[LegTokens]:
        """The tokens that may now go to the client, in order."""
        match event:
            case Accepted():
                if leg is self._prefill and event.lease_id is not None:
                    self._lease_s = event.lease_s
                    self._start_decode(leg, event.lease_id)
                elif leg is self._decode:
                    self._lease_s = 0.0  # from here on the reader renews
            case Rejected():
                self._rejected(leg, event)
            case LegFailed():
                self._fail(leg, event)
            case LegTokens() if leg is self._prefill:
                return self._first_token(event)
            case LegTokens() if leg is self._decode:
                if not self._has_first:
                    self._early.append(event)
                    return []
                return self._decoded(event)
            case LegTokens():
                pass  # of a decode leg that was given up
        return []

    def _first_token(self, event: LegTokens) -> list[LegTokens]:
        self._has_first = True
        self._progress.prefill_times = event.times or LegTimes()
        ready = [event]
        for early in self._early:
            ready += self._decoded(early)
        return ready

    def _decoded(self, event: LegTokens) -> list[LegTokens]:
        if event.times is not None:
            self._progress.decode_times = event.times
            self._progress.marks[Stage.DECODE] = self._flow.clock.now_s()
        if event.finish is not None and self._decode is not None:
            self._decode.link.finish(self._decode)
        return [event]

    def _rejected(self, leg: Leg, event: Rejected) -> None:
        """A decode worker's no costs only another choice; a prefill worker's, another attempt."""
        self._failed.add(leg.link.record.incarnation)
        leg.link.finish(leg)
        error = from_code(event.code, event.message)
        if leg is not self._decode or not error.retryable:
            raise error
        self._submit_decode()

    def _fail(self, leg: Leg, event: LegFailed) -> None:
        leg.link.finish(leg)
        error = from_code(event.code, event.message)
        if isinstance(error, Unavailable):
            self._failed.add(leg.link.record.incarnation)
        raise error

    def _emit(self, tokens: LegTokens) -> Generated:
        progress = self._progress
        progress.emit(tokens.tokens, self._flow.clock.now_s())
        return Generated(
            tokens=tokens.tokens,
            finish=tokens.finish,
            cached_tokens=progress.prefill_times.cached_tokens,
            timings=progress.timings() if tokens.finish is not None else None,
            logits=tokens.logits,
        )

    # -- hops -----------------------------------------------------------------------------------

    def _start_prefill(self) -> None:
        request = self._progress.request
        hashes = self._flow.hashes(self._context, request.cache_salt)
        self._progress.marks[Stage.ROUTE] = self._flow.clock.now_s()
        placed = self._flow.place_prefill(self._context, hashes, self._failed)
        self._progress.prefill_worker = placed.link.record.worker_id
        log.info("route_prefill request_id=%s %s", request.request_id, placed.decision.explain())
        self._progress.marks[Stage.PREFILL] = self._flow.clock.now_s()
        self._prefill = placed.link.submit(
            lambda number: PrefillSubmit(
                number=number,
                sequence_id=self._sequence_id,
                tokens=tuple(self._context),
                output_position=self._output_position,
                sampling=request.sampling,
                deadline_s=self._remaining_s(),
                cache_salt=request.cache_salt,
            ),
            self._hear,
            placed.load_tokens,
        )

    def _start_decode(self, prefill: Leg, lease_id: LeaseId) -> None:
        view = prefill.link.view
        if view is None:
            return  # its loss is already in the inbox
        self._handoff = Handoff(
            owner_id=view.hello.worker_id,
            owner_address=view.hello.peer_address,
            owner_incarnation=view.hello.incarnation,
            lease_id=lease_id,
        )
        if self._output_position + 1 < self._progress.request.sampling.max_tokens:
            self._submit_decode()

    def _submit_decode(self) -> None:
        request = self._progress.request
        left = request.sampling.max_tokens - self._output_position
        placed = self._flow.place_decode(len(self._context) + left, self._failed)
        self._progress.decode_worker = placed.link.record.worker_id
        log.info("route_decode request_id=%s %s", request.request_id, placed.decision.explain())
        self._decode = placed.link.submit(
            lambda number: DecodeSubmit(
                number=number,
                sequence_id=self._sequence_id,
                tokens=tuple(self._context),
                output_position=self._output_position,
                sampling=request.sampling,
                deadline_s=self._remaining_s(),
                handoff=self._handoff,
                cache_salt=request.cache_salt,
            ),
            self._hear,
            placed.load_tokens,
        )

    # -- waiting --------------------------------------------------------------------------------

    def _hear(self, leg: Leg, event: LegEvent) -> None:
        self._inbox.put_nowait((leg, event))

    async def _next(self) -> tuple[Leg, LegEvent]:
        """The next event; renews the lease while no reader is bound to it."""
        if not self._inbox.empty():
            return self._inbox.get_nowait()
        while (remaining_s := self._remaining_s()) > 0:
            renewing = self._lease_s > 0 and self._handoff is not None
            timeout_s = min(remaining_s, self._lease_s / 3) if renewing else remaining_s
            try:
                return await asyncio.wait_for(self._inbox.get(), timeout_s)
            except TimeoutError:
                if renewing and self._prefill is not None and self._handoff is not None:
                    self._prefill.link.send(RenewLeases(lease_ids=(self._handoff.lease_id,)))
        raise DeadlineExceeded(
            f"the request did not finish within {self._progress.request.deadline_s:.1f} s"
        )

    def _remaining_s(self) -> float:
        return self._progress.remaining_s(self._flow.clock.now_s())


def _describe(link: WorkerLink) -> WorkerView:
    view, load = link.view, link.view.load if link.view is not None else None
    base = WorkerView(
        worker_id=link.record.worker_id,
        role=view.hello.role if view is not None else link.record.role,
        address=link.record.address,
        connected=view is not None,
    )
    if load is None:
        return base
    return WorkerView(
        worker_id=base.worker_id,
        role=base.role,
        address=base.address,
        connected=True,
        draining=load.draining,
        waiting=load.waiting,
        running=load.running,
        queued_tokens=load.queued_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
    )
