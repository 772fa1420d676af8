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
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Self

from core import telemetry
from core.blocks import chain_hashes, root_hash
from core.clock import Clock
from core.errors import DeadlineExceeded, NoWorkers, Unavailable, from_code
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
from router.progress import Observed, Progress, SequenceObserver
from router.types import Generated, GenerateRequest, ServingLimits, WorkerView

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
        observers: Sequence[SequenceObserver] = (),
    ) -> None:
        self._fleet = fleet
        self._policies = policies
        self._config = config
        self._clock = clock
        self._random = random
        self._observers = tuple(observers)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Generated, None]:
        """Yield tokens until the finish; see router.types.Generator."""
        progress = Progress(request, self._clock)
        failed: set[Incarnation] = set()
        patience_s = self._config.worker_wait_s
        with Observed(progress, self._observers):
            for attempt in range(self._config.max_attempts):
                patience_s -= await self._wait_for_workers(min(patience_s, progress.remaining_s))
                try:
                    with _Attempt(self, progress, attempt, failed) as hops:
                        hops.start()
                        while not progress.finished:
                            for item in await hops.next():
                                yield item
                    return
                except Unavailable as error:
                    self._consider_retry(progress, attempt, error)
                await asyncio.sleep(_RETRY_PAUSE_S * attempt)

    async def _wait_for_workers(self, timeout_s: float) -> float:
        """Wait until both pools are routable, or `timeout_s`; answers the seconds it took."""
        began_s = now_s = self._clock.now_s()
        while now_s - began_s < timeout_s and not self.limits().ready:
            await asyncio.sleep(_RETRY_PAUSE_S)
            now_s = self._clock.now_s()
        return now_s - began_s

    def _consider_retry(self, progress: Progress, attempt: int, error: Unavailable) -> None:
        """Log why the attempt failed; raises `error` when no other one may follow."""
        last = attempt + 1 == self._config.max_attempts
        retry = not last and progress.remaining_s > _RETRY_PAUSE_S
        line = telemetry.log_line(
            "attempt_failed",
            request_id=progress.request.request_id,
            attempt=attempt,
            code=error.code,
            retry=retry,
            reason=error.message,
        )
        log.warning("%s", line)
        if not retry:
            raise error

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

    def has_decode(self, excluding: set[Incarnation]) -> bool:
        """Whether a decode worker is routable that this request has not failed on."""
        return bool(self._fleet.routable(Role.DECODE, excluding=excluding))

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


class _Attempt:
    """One placement of one sequence. Both legs' events meet in one inbox and are taken in order.

    As a block: it begins with the prefill, and leaves no leg open however it ends.
    """

    def __init__(
        self, flow: Flow, progress: Progress, attempt: int, failed: set[Incarnation]
    ) -> None:
        self._flow = flow
        self._progress = progress
        self._failed = failed
        self._sequence_id = SequenceId(
            progress.request.request_id, progress.request.choice, attempt
        )
        self._context = [*progress.request.prompt_tokens, *progress.tokens]
        self._output_position = len(progress.tokens)
        self._inbox: asyncio.Queue[tuple[Leg, LegEvent] | None] = asyncio.Queue()
        self._prefill: Leg | None = None
        self._decode: Leg | None = None
        self._handoff: Handoff | None = None
        self._lease_s = 0.0
        self._early: list[LegTokens] = []
        self._has_first = False
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(progress.remaining_s, self._inbox.put_nowait, None)
        self._renewal: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.outcomes.append(self._progress.outcome(error))
        self._deadline.cancel()
        self._stop_renewing()
        for open_leg in (self._prefill, self._decode):
            if open_leg is not None:
                open_leg.cancel("the request has ended")

    def start(self) -> None:
        """Place the prefill; all else follows from what the workers say. Raises Unavailable."""
        request, progress = self._progress.request, self._progress
        progress.attempts += 1
        progress.mark(Stage.ROUTE)
        hashes = self._flow.hashes(self._context, request.cache_salt)
        placed = self._flow.place_prefill(self._context, hashes, self._failed)
        progress.prefill_worker = placed.link.record.worker_id
        log.info("route_prefill request_id=%s %s", request.request_id, placed.decision.explain())
        progress.mark(Stage.PREFILL, progress.prefill_worker)
        self._prefill = placed.link.submit(
            lambda number: PrefillSubmit(
                number=number,
                sequence_id=self._sequence_id,
                tokens=tuple(self._context),
                output_position=self._output_position,
                sampling=request.sampling,
                deadline_s=progress.remaining_s,
                cache_salt=request.cache_salt,
            ),
            self._hear,
            placed.load_tokens,
        )

    async def next(self) -> list[Generated]:
        """What the next event lets go to the client; raises what ended a leg."""
        heard = await self._inbox.get()
        if heard is None:
            limit_s = self._progress.request.deadline_s
            raise DeadlineExceeded(f"the request did not finish within {limit_s:.1f} s")
        return [self._emit(tokens) for tokens in self._take(*heard)]

    # -- events ---------------------------------------------------------------------------------

    def _take(self, leg: Leg, event: LegEvent) -> list[LegTokens]:
        """The tokens that may now go to the client, in order."""
        if leg is not self._prefill and leg is not self._decode:
            return []  # of a leg that was given up, or is needed no more
        match event:
            case Accepted():
                if leg is self._prefill and event.lease_id is not None:
                    self._lease_s = event.lease_s
                    self._start_decode(leg, event.lease_id)
                elif leg is self._decode:
                    self._stop_renewing()  # from here on the reader renews
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
        return []

    def _first_token(self, event: LegTokens) -> list[LegTokens]:
        self._has_first = True
        self._progress.prefill_times = event.times or LegTimes()
        if event.finish is None:
            self._progress.mark(Stage.KV_TRANSFER, self._progress.decode_worker)
        ready = [event]
        for early in self._early:
            ready += self._decoded(early)
        return ready

    def _decoded(self, event: LegTokens) -> list[LegTokens]:
        if self._prefill is not None:
            # The KV has arrived and its lease is closed: the prefill worker may go now.
            self._prefill.link.finish(self._prefill)
            self._prefill = None
        if event.times is not None:
            self._progress.decode_times = event.times
            self._progress.mark(Stage.DECODE, self._progress.decode_worker)
        if event.finish is not None and self._decode is not None:
            self._decode.link.finish(self._decode)
        return [event]

    def _rejected(self, leg: Leg, event: Rejected) -> None:
        """A decode worker's no costs only another choice; a prefill worker's, another attempt."""
        self._failed.add(leg.link.record.incarnation)
        leg.link.finish(leg)
        error = from_code(event.code, event.message)
        others = leg is self._decode and self._flow.has_decode(excluding=self._failed)
        if not others or not error.retryable:
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
        progress.emit(tokens.tokens)
        progress.finished = tokens.finish is not None
        return Generated(
            tokens=tokens.tokens,
            finish=tokens.finish,
            cached_tokens=progress.prefill_times.cached_tokens,
            timings=progress.timings() if tokens.finish is not None else None,
            logits=tokens.logits,
        )

    # -- hops -----------------------------------------------------------------------------------

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
        self._renew_later()
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
                deadline_s=self._progress.remaining_s,
                handoff=self._handoff,
                cache_salt=request.cache_salt,
            ),
            self._hear,
            placed.load_tokens,
        )

    def _hear(self, leg: Leg, event: LegEvent) -> None:
        self._inbox.put_nowait((leg, event))

    # -- the lease, while no reader is bound to it ------------------------------------------------

    def _renew_later(self) -> None:
        if self._lease_s > 0:
            loop = asyncio.get_running_loop()
            self._renewal = loop.call_later(self._lease_s / 3, self._renew)

    def _renew(self) -> None:
        if self._prefill is not None and self._handoff is not None:
            self._prefill.link.send(RenewLeases(lease_ids=(self._handoff.lease_id,)))
            self._renew_later()

    def _stop_renewing(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
            self._renewal = None


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
