"""One worker: engine, pool, transfers and both roles, wired together. No gRPC in here.

Its role is a label with an epoch. Both roles exist in every worker and share everything below, so
changing the label moves no memory and ends no lease.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from cluster.worker.outlet import RouterOutlet
from core.clock import Clock
from core.errors import BatonError, InternalError, Unavailable
from core.ids import BlockHash, Incarnation, Role, WorkerId
from core.messages import (
    Cancel,
    DecodeSubmit,
    KvEvents,
    KvSnapshot,
    LegFailed,
    LoadReport,
    Offer,
    PrefillSubmit,
    Rejected,
    RenewLeases,
    RouterToWorker,
    SnapshotRequest,
    Withdraw,
    WorkerHello,
    WorkerToRouter,
)
from core.stages import Stage
from core.step import StepBudget
from decode_worker.config import DecodeConfig
from decode_worker.policy import pull_headroom_blocks
from decode_worker.role import DecodeRole
from engine.arena import Arena
from engine.config import EngineConfig
from engine.pool import BlockPool, PoolCounts
from engine.runner import Runner
from engine.types import Engine
from kv_transfer.config import TransferConfig
from kv_transfer.leases import LeaseTable
from kv_transfer.messages import PeerHello, Shard
from kv_transfer.owner import Owner
from kv_transfer.reader import Reader
from kv_transfer.transports import Transports
from prefill_worker.config import PrefillConfig
from prefill_worker.role import PrefillRole

log = logging.getLogger(__name__)

LegMessage = PrefillSubmit | DecodeSubmit | Offer | Cancel | Withdraw

_SWEEP_S = 0.25
_CHECK_S = 5.0  # the check looks at every block: a tenth of a second for 65,536
_STOP_S = 10.0
_SNAPSHOT_HASHES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The rooms' settings one worker needs."""

    engine: EngineConfig
    transfer: TransferConfig
    prefill: PrefillConfig
    decode: DecodeConfig
    step_s: float | None = None
    """What a step should take that computes part of a prompt beside answers; None: no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """Who this process is, and where two of its doors are: `address` for control calls,
    `peer_address` for workers that read from here. That for routers is in its record only.
    """

    worker_id: WorkerId
    incarnation: Incarnation
    address: str
    peer_address: str
    network_domain: str = ""


class Worker:
    """Everything on the event loop. `running` starts it; `handle` takes a router's messages."""

    def __init__(
        self,
        *,
        engine: Engine,
        transports: Transports,
        identity: WorkerIdentity,
        role: Role,
        settings: WorkerSettings,
        clock: Clock,
    ) -> None:
        info = engine.info
        self._engine = engine
        self.transports = transports
        self._identity = identity
        self._clock = clock
        self._role, self._epoch = role, 1
        self._config = settings.engine
        self._draining = False
        self._outlets: set[RouterOutlet] = set()
        self._next_event = 1
        self.message_bugs = 0
        """Messages of routers that `handled_badly` has heard of."""
        self.pool = BlockPool(info.num_blocks)
        self.runner = Runner(
            engine,
            self.pool,
            clock,
            step_tokens=settings.engine.step_tokens,
            chunk_tokens=settings.engine.chunk_tokens,
            max_batch=settings.engine.max_batch,
            step_timeout_s=settings.engine.step_timeout_s,
            on_step_end=self._step_ended,
            budget=StepBudget(settings.step_s),
        )
        self.leases = LeaseTable(self.pool, clock, settings.transfer.lease_s, transports.seals)
        self.owner = Owner(self.leases, self._blocks_freed)
        self.reader = Reader(
            pool=self.pool,
            arena=engine.arena,
            transports=transports,
            hello=self.peer_hello,
            config=settings.transfer,
            headroom=lambda: pull_headroom_blocks(self.runner.running, self.runner.awaited_blocks),
        )
        self.prefill = PrefillRole(
            info=info,
            runner=self.runner,
            pool=self.pool,
            owner=self.owner,
            reader=self.reader,
            config=settings.prefill,
            clock=clock,
        )
        self._decode = DecodeRole(
            info=info,
            runner=self.runner,
            pool=self.pool,
            reader=self.reader,
            owner=self.owner,
            config=settings.decode,
            clock=clock,
        )

    # -- life -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Run the loops inside. The task given ends only by failure: then the worker must end."""
        try:
            async with self.reader, self.prefill, self._decode:
                loop = asyncio.create_task(self._run(), name="engine-loop")
                try:
                    yield loop
                finally:
                    loop.cancel()
                    await asyncio.wait([loop], timeout=_STOP_S)
        finally:
            await self.transports.close()
            self._engine.close()

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.runner.run())
            group.create_task(self._sweep())
            group.create_task(self._watch_transport())

    async def _watch_transport(self) -> None:
        error = await self.transports.failed()
        raise InternalError(f"the KV transport failed: {error}") from error

    async def _sweep(self) -> None:
        """Leases expire, and invariants are checked, also while the engine is idle."""
        checked_at_step, checked_at_s = 0, self._clock.now_s()
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.owner.sweep()
            self._step_ended()
            now_s = self._clock.now_s()
            changed = self.runner.steps != checked_at_step
            if changed and self._idle and now_s - checked_at_s >= _CHECK_S:
                checked_at_step, checked_at_s = self.runner.steps, now_s
                self._check()

    async def drain(self, timeout_s: float) -> int:
        """Refuse new legs and wait for the open ones; answers how many are left."""
        self._draining = True
        self._step_ended()
        give_up_at_s = self._clock.now_s() + timeout_s
        while self.open_legs and self._clock.now_s() < give_up_at_s:  # noqa: ASYNC110 - bounded
            await asyncio.sleep(_SWEEP_S / 10)
        return self.open_legs

    # -- routers --------------------------------------------------------------------------------

    def attach(self, say: Callable[[WorkerToRouter], None]) -> RouterOutlet:
        """A router's stream: hello, all that is cached, the load; then whatever changes.

        `say` puts a message on its way to the router and never waits.
        """
        outlet = RouterOutlet(say)
        self._broadcast_events()
        self._outlets.add(outlet)
        outlet.send(self.hello())
        self._send_snapshot(outlet)
        outlet.report(self.load(outlet.last_submit), self._clock.now_s())
        return outlet

    def detach(self, outlet: RouterOutlet) -> None:
        """The stream ended, and with it all its legs."""
        self._outlets.discard(outlet)
        try:
            self.prefill.sink_lost(outlet)
        finally:
            self._decode.sink_lost(outlet)
            self._blocks_freed()

    def handle(self, outlet: RouterOutlet, message: RouterToWorker) -> None:
        """One message of one router."""
        match message:
            case PrefillSubmit() | DecodeSubmit():
                if outlet.is_new(message.number):
                    self._submit(outlet, message)
                else:
                    log.error("submit_number_repeated number=%d", message.number)
            case Offer():
                self._decode.offer(outlet, message.number)
            case Cancel():
                self.prefill.cancel(outlet, message.number, message.reason)
                self._decode.cancel(outlet, message.number)
                self._blocks_freed()
            case Withdraw():
                self.prefill.withdraw(outlet, message.number)
                self._blocks_freed()
            case RenewLeases():
                self.leases.renew(message.lease_ids, reader=None)
            case SnapshotRequest():
                self._broadcast_events()
                self._send_snapshot(outlet)

    def handled_badly(self, outlet: RouterOutlet, message: LegMessage, bug: Exception) -> None:
        """`handle` has raised: a bug, which ends the leg that the message is about."""
        kind, number = type(message).__name__, message.number
        log.error("router_message_bug message=%s number=%d", kind, number, exc_info=bug)
        self.message_bugs += 1
        try:
            self.fail_leg(outlet, number, InternalError(f"a bug in the worker: its log has {kind}"))
        except Exception:  # as if it were over: nobody can end it any better
            log.exception("leg_not_ended number=%d", number)

    def fail_leg(self, outlet: RouterOutlet, number: int, error: BatonError) -> None:
        """End a leg of which the router cannot be told, and tell it that; other legs go on."""
        stage = Stage.PREFILL if self._role is Role.PREFILL else Stage.DECODE
        failed = LegFailed(number=number, code=error.code, message=error.message, stage=stage)
        try:
            self.handle(outlet, Cancel(number=number, reason=error.message))
        finally:
            outlet.send(failed)

    def _submit(self, outlet: RouterOutlet, submit: PrefillSubmit | DecodeSubmit) -> None:
        refusal: BatonError | None = None
        if self._draining:
            refusal = Unavailable("this worker is draining")
        elif not self._is_for_role(submit):
            refusal = Unavailable(f"this worker's role is {self._role}")
        if refusal is not None:
            outlet.send(Rejected(number=submit.number, code=refusal.code, message=refusal.message))
        elif isinstance(submit, PrefillSubmit):
            self.prefill.submit(submit, outlet)
        else:
            self._decode.submit(submit, outlet)

    def _is_for_role(self, submit: PrefillSubmit | DecodeSubmit) -> bool:
        """A sequence that needs no hand-off may be served by either role alone."""
        if isinstance(submit, DecodeSubmit) and submit.handoff is None:
            return True
        return isinstance(submit, PrefillSubmit) == (self._role is Role.PREFILL)

    # -- reports --------------------------------------------------------------------------------

    @property
    def open_legs(self) -> int:
        return self.prefill.open_legs + self._decode.open_legs

    @property
    def _idle(self) -> bool:
        return (
            self.open_legs == 0
            and self.runner.idle
            and not (self._decode.pulls or self.prefill.pulls)
        )

    @property
    def arena(self) -> Arena:
        return self._engine.arena

    def peer_hello(self) -> PeerHello:
        """What peers must know to read from here, as it is now."""
        info = self._engine.info
        return PeerHello(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            model_id=info.model_id,
            shards=(Shard(layout=info.layout, memories=self.transports.memories()),),
        )

    def hello(self) -> WorkerHello:
        info = self._engine.info
        return WorkerHello(
            worker_id=self._identity.worker_id,
            incarnation=self._identity.incarnation,
            role=self._role,
            epoch=self._epoch,
            model_id=info.model_id,
            layout=info.layout,
            num_blocks=info.num_blocks,
            context_tokens=info.context_tokens,
            peer_address=self._identity.peer_address,
            network_domain=self._identity.network_domain,
            step_tokens=self._config.step_tokens,
            chunk_tokens=min(self._config.chunk_tokens, self._config.step_tokens),
            device=info.device,
        )

    def load(self, last_submit: int = 0) -> LoadReport:
        load = self.runner.load()
        return LoadReport(
            last_submit=last_submit,
            queued_tokens=load.queued_tokens + self.prefill.pulling_tokens,
            waiting=load.waiting + self._decode.pulls + self.prefill.pulls,
            running=load.running,
            context_tokens=load.context_tokens + self._decode.pulling_tokens,
            decoding=load.decoding,
            decoding_tokens=load.decoding_tokens,
            free_blocks=self.pool.available,
            total_blocks=self.pool.num_blocks,
            draining=self._draining,
            step_age_s=self.runner.step_age_s,
            longest_step_s=self.runner.longest_step.seconds,
        )

    def pool_counts(self) -> tuple[PoolCounts, str]:
        """Blocks by state, and what is wrong with them (empty: nothing)."""
        try:
            self._check()
        except InternalError as error:
            return self.pool.counts(), error.message
        return self.pool.counts(), ""

    def _check(self) -> None:
        self.pool.check()
        self.leases.check()
        if self._idle:
            self.pool.check_idle()

    def _step_ended(self) -> None:
        self.reader.space_freed()  # a sequence may have ended in it
        self._broadcast_events()
        for outlet in self._outlets:
            outlet.flush()  # which may end legs, and change the load
        load, now_s = self.load(), self._clock.now_s()
        for outlet in self._outlets:
            outlet.report(replace(load, last_submit=outlet.last_submit), now_s)

    def _blocks_freed(self) -> None:
        self.reader.space_freed()
        self.runner.wake()

    def _broadcast_events(self) -> None:
        events = self.pool.take_events()
        if events:
            message = KvEvents(first_number=self._next_event, events=tuple(events))
            self._next_event += len(events)
            for outlet in self._outlets:
                outlet.send(message)

    def _send_snapshot(self, outlet: RouterOutlet) -> None:
        hashes: list[BlockHash] = self.pool.hashes()
        for start in range(0, max(1, len(hashes)), _SNAPSHOT_HASHES):
            chunk = tuple(hashes[start : start + _SNAPSHOT_HASHES])
            outlet.send(
                KvSnapshot(
                    next_number=self._next_event,
                    hashes=chunk,
                    last=start + _SNAPSHOT_HASHES >= len(hashes),
                )
            )
