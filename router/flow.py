"""A request's way through the workers: attempts, one after the other, until one reaches the end.

When a leg fails, the others are cancelled at once, and the next attempt continues elsewhere from
prompt + tokens so far: sampling depends on seed and position alone, so the client sees a pause and
the same text. Attempt numbers fence: what an older attempt still says reaches nobody. The order of
hops within an attempt is in attempt.py; no other file knows both workers of a sequence.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from random import Random
from typing import NamedTuple

from core import telemetry
from core.blocks import join_tokens
from core.clock import Clock
from core.errors import InvalidRequest, Unavailable
from core.ids import RequestId, Role, WorkerId
from router.admission import QueueBounds
from router.admission_line import Admission, SloClass
from router.attempt import Attempt
from router.chooser import Chooser
from router.client import WorkerLink
from router.config import RouterConfig
from router.fleet import Fleet
from router.local import LocalVerdict
from router.outliers import OutlierRules, Outliers
from router.placement import Considered
from router.policies.base import Decision
from router.policies.build import Policies
from router.progress import Observed, Progress, SequenceObserver
from router.pulled import pulled
from router.rebalancer import Rebalancer
from router.tries import RETRY_PAUSE_S, Tries
from router.types import (
    Generated,
    GenerateRequest,
    MigrationReport,
    PromptRefused,
    Requeued,
    RouteCandidate,
    RouteChoice,
    ServingLimits,
    Shut,
    TokenSink,
    WorkerStatus,
)
from router.watcher import EjectReason, FlowWatcher, Requeue, Unwatched

log = logging.getLogger(__name__)


class _No(NamedTuple):
    """Of a full prefill worker; `load` in its own words."""

    worker_id: WorkerId
    load: str


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
        watcher: FlowWatcher | None = None,
    ) -> None:
        self._fleet = fleet
        self._watcher = watcher = watcher or Unwatched()
        self._outliers = Outliers(_outlier_rules(config), watcher)
        self._chooser = Chooser(fleet, policies, clock, random, self._outliers)
        self._config = config
        self._clock = clock
        self._observers = (self._chooser.learning, *observers)
        self._slo_class = SloClass(name="default", slo=policies.slo)
        self._admission = Admission(
            self._chooser,
            clock,
            QueueBounds(
                requests=config.admission_max_requests, prompt_tokens=config.admission_max_tokens
            ),
            watcher,
            ready=self._has_pools,
            enabled=config.admission == "slo",
            decode=config.admission_decode,
            local=config.local_prefill,
            worker_wait_s=config.worker_wait_s,
        )
        self._rebalancer = Rebalancer(
            self._chooser, clock, watcher, ttft_s=policies.slo.ttft_s, enabled=config.requeue
        )
        self._pools_there = asyncio.Event()
        fleet.on_load = self._look
        fleet.on_hung = partial(watcher.ejected, EjectReason.HUNG)
        fleet.on_well = watcher.readmitted
        self._running: dict[tuple[RequestId, int], Attempt] = {}

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Generated, None]:
        """`run`, for those who would rather pull."""
        return pulled(self, request)

    async def run(self, request: GenerateRequest, sink: TokenSink) -> None:
        """Give `sink` tokens until the finish; see router.types.Generator."""
        progress = Progress(request, self._clock)
        with Observed(progress, self._observers):
            async with self._admission.admitted(progress, self._slo_class) as considered:
                await self._attempts(progress, sink, considered)

    def _look(self) -> None:
        """Loads have changed, or who is there."""
        if self._has_pools():
            self._pools_there.set()
        else:
            self._pools_there.clear()
        self._admission.look()
        self._rebalancer.look()

    async def _attempts(
        self, progress: Progress, sink: TokenSink, place: Considered | None
    ) -> None:
        """One after the other; the first, of a sequence just admitted, goes to its `place`.

        A prompt that a full prefill worker refuses is offered to the next at once ("on-demand
        forwarding upon rejection", P/D-Serve, arXiv 2408.08147), and a row of noes is one attempt,
        which ends where `max_forwards` have said no; the next one asks the others first. What has
        begun elsewhere is not refused for load: it costs a pause, and counts as no attempt (Tries).
        """
        shut, tries = Shut(), Tries(self._config.max_attempts)
        no: _No | None = None
        noes = 0
        for attempt in count():
            given = len(progress.tokens)
            try:
                with self._attempt(progress, attempt, shut, sink) as hops:
                    hops.start(place)
                    if no is not None:
                        _log_forward(progress, no)
                    await hops.end()
                return
            except Requeued as requeued:
                place, no = self._place_again(progress, requeued.to, shut), None
                continue
            except Unavailable as error:
                place = no = None
                if isinstance(error, PromptRefused):
                    noes += 1
                    others = self._chooser.has_prefill(excluding=shut.all)
                    if others and noes < self._config.max_forwards:
                        no = _No(error.worker_id, error.message)
                        continue
                    if not others:
                        shut.full.clear()  # the next row asks all of them again
                more = tries.may_follow(error, len(progress.tokens) - given)
                self._consider_retry(progress, attempt, error, more=more)
            noes = 0
            await asyncio.sleep(tries.pause_s())
            await self._wait_for_workers(progress)

    @contextmanager
    def _attempt(
        self, progress: Progress, attempt: int, shut: Shut, sink: TokenSink
    ) -> Iterator[Attempt]:
        """A block around one placement, to its last token."""
        hops = Attempt(
            self._chooser,
            progress,
            attempt,
            shut,
            self._clock,
            sink=sink,
            answer_s=self._config.worker_silence_s,
        )
        with hops, self._known(progress.request, hops):
            yield hops

    def _place_again(self, progress: Progress, to: WorkerId, shut: Shut) -> Considered | None:
        """The place a queued prompt moves to; None if that is gone, for the policy to choose."""
        progress.requeued = True
        self._watcher.requeued(Requeue.MOVED)
        context = join_tokens(progress.request.prompt_tokens, progress.tokens)
        return self._chooser.consider_at(to, context, progress.request.cache_salt, shut.all)

    async def migrate(
        self, request_id: RequestId, choice: int, to: WorkerId | None, timeout_s: float
    ) -> MigrationReport:
        """Move a running sequence to another decode worker; see router.types.Generator."""
        hops = self._running.get((request_id, choice))
        if hops is None:
            raise InvalidRequest(f"no sequence {request_id}/{choice} runs", param="request_id")
        return await hops.migrate(to, timeout_s)

    @contextmanager
    def _known(self, request: GenerateRequest, hops: Attempt) -> Iterator[None]:
        """Control calls find the attempt inside."""
        key = (request.request_id, request.choice)
        self._running[key] = hops
        try:
            yield
        finally:
            if self._running.get(key) is hops:
                del self._running[key]

    async def _wait_for_workers(self, progress: Progress) -> None:
        """Of a sequence that was admitted: until each pool has a worker, or its patience is up."""
        if self._has_pools():
            return
        began_s = self._clock.now_s()
        patience_s = self._config.worker_wait_s - progress.workerless_s
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, min(patience_s, progress.remaining_s))):
                await self._pools_there.wait()
        progress.workerless_s += self._clock.now_s() - began_s

    def _has_pools(self) -> bool:
        return self.limits().ready

    def _consider_retry(
        self, progress: Progress, attempt: int, error: Unavailable, *, more: bool
    ) -> None:
        """Log why the attempt failed; raises `error` when no other one may follow."""
        retry = more and progress.remaining_s > RETRY_PAUSE_S
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

    def explain_route(self, request: GenerateRequest) -> tuple[RouteChoice, ...]:
        """See router.types.RouteExplainer."""
        total_tokens = len(request.prompt_tokens) + request.sampling.max_tokens
        explained = self._chooser.explain(
            request.prompt_tokens,
            request.cache_salt,
            total_tokens,
            local=self._config.local_prefill,
        )
        return (
            _choice(Role.PREFILL, explained.prefill, explained.local),
            _choice(Role.DECODE, explained.decode, explained.local),
        )

    def limits(self) -> ServingLimits:
        return self._fleet.limits

    def workers(self) -> tuple[WorkerStatus, ...]:
        return tuple(self._with_health(link) for link in self._fleet.links())

    def _with_health(self, link: WorkerLink) -> WorkerStatus:
        reason = self._outliers.ejected_for(link.record.incarnation)
        if link.view is not None and link.view.hung:
            reason = EjectReason.HUNG
        return replace(_describe(link), ejected=reason is not None, ejected_for=reason or "")


def _log_forward(progress: Progress, no: _No) -> None:
    """One line per no of a prompt that was offered to the next at once."""
    if log.isEnabledFor(logging.DEBUG):
        line = telemetry.log_line(
            "prompt_forwarded",
            request_id=progress.request.request_id,
            worker_id=no.worker_id,
            load=no.load,
            next=progress.prefill_worker,
        )
        log.debug("%s", line)


def _outlier_rules(config: RouterConfig) -> OutlierRules:
    return OutlierRules(failures=config.eject_after_failures, eject_s=config.eject_s)


def _choice(leg: Role, decision: Decision, local: LocalVerdict) -> RouteChoice:
    return RouteChoice(
        leg=leg,
        worker_id=decision.worker_id,
        rule=decision.rule,
        candidates=tuple(
            RouteCandidate(worker_id=worker_id, cost=cost, terms=dict(terms))
            for worker_id, cost, terms in decision.candidates
        ),
        line=decision.explain(),
        local=local,
    )


def _describe(link: WorkerLink) -> WorkerStatus:
    view, load = link.view, link.view.load if link.view is not None else None
    status = WorkerStatus(
        worker_id=link.record.worker_id,
        role=view.hello.role if view is not None else link.record.role,
        address=link.record.address,
        connected=view is not None,
        reason=link.problem,
    )
    if load is None:
        return status
    return replace(
        status,
        draining=load.draining,
        waiting=load.waiting,
        running=load.running,
        queued_tokens=load.queued_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
    )
