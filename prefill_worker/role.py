"""A worker as prefill worker: submit -> lease -> chunks announced -> first token -> lease lives on.

A prompt whose prefix another worker holds may wait for a copy of that first (prefix.py). The leg
ends for the router with the first token; the lease ends with the reader's close, an abort, or its
expiry. Until then a cancel of the leg still ends the lease.
"""

import asyncio
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType

from core.blocks import root_hash
from core.clock import Clock
from core.errors import BatonError, Overloaded
from core.messages import (
    Accepted,
    LegFailed,
    LegTimes,
    LegTokens,
    PrefillSubmit,
    PrefixSource,
    Rejected,
    Withdrawn,
)
from core.sampling import FinishReason
from core.sink import RouterSink
from core.stages import Stage
from engine.pool import BlockPool
from engine.runner import Runner
from engine.sequence import Sequence
from engine.types import EngineInfo, Sampled
from kv_transfer.leases import Lease
from kv_transfer.messages import LeaseOutcome
from kv_transfer.owner import Owner
from kv_transfer.reader import Reader
from prefill_worker.config import PrefillConfig
from prefill_worker.policy import refuse_prompt
from prefill_worker.prefix import Brought, FetchCounters, PrefixFetcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _LegKey:
    sink: int
    number: int


class PrefillRole:
    """All prefill legs of one worker. Entered once (`async with`); it owns the fetch tasks."""

    def __init__(
        self,
        *,
        info: EngineInfo,
        runner: Runner,
        owner: Owner,
        config: PrefillConfig,
        clock: Clock,
        pool: BlockPool,
        reader: Reader,
    ) -> None:
        self._info = info
        self._runner = runner
        self._pool = pool
        self._owner = owner
        self._config = config
        self._clock = clock
        self._capacity_tokens = min(info.context_tokens, info.num_blocks * info.layout.block_size)
        self._legs: dict[_LegKey, _PrefillLeg] = {}
        self._prefixes = PrefixFetcher(
            info=info, pool=pool, reader=reader, cost=runner.prefill_cost, clock=clock
        )
        self.pulls = 0
        """Fetches that run; a cancelled one counts until it has given everything back."""
        self.pulling_tokens = 0
        """Prompt tokens that will have to be computed after those fetches."""
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> "PrefillRole":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for leg in self._legs.values():
            if leg.fetch is not None:
                leg.fetch.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    @property
    def open_legs(self) -> int:
        """Legs whose prefill runs or whose lease is open."""
        return len(self._legs)

    @property
    def fetches(self) -> FetchCounters:
        """Prefixes fetched from other workers, and why others were not."""
        return self._prefixes.counters

    def submit(self, submit: PrefillSubmit, sink: RouterSink) -> None:
        """Accept, with a lease, or reject with the true reason."""
        queued_tokens = self._runner.load().queued_tokens + self.pulling_tokens
        refusal = refuse_prompt(
            len(submit.tokens), self._capacity_tokens, queued_tokens, self.open_legs, self._config
        )
        if refusal is not None:
            rejected = Rejected(number=submit.number, code=refusal.code, message=refusal.message)
            sink.send(rejected)
            return
        sequence = Sequence.of(submit, self._info.model_id, self._clock.now_s())
        leg = _PrefillLeg(self, sink, submit.number, sequence)
        leg.lease = lease = self._owner.open(submit.sequence_id, leg)
        self._legs[leg.key] = leg
        sink.send(
            Accepted(
                number=submit.number, lease_id=lease.lease_id, lease_s=self._owner.table.lease_s
            )
        )
        if submit.source is not None and self._prefixes.pays(sequence, submit.source):
            fetch = self._fetch(leg, submit.source, submit.cache_salt)
            leg.fetch = self._tasks.create_task(fetch)
        else:
            self._runner.submit(sequence, leg)

    def cancel(
        self,
        sink: RouterSink,
        number: int,
        reason: str,
        outcome: LeaseOutcome = LeaseOutcome.ABORTED,
    ) -> None:
        """Stop the prefill, or end the lease it left."""
        leg = self._legs.pop(_LegKey(id(sink), number), None)
        if leg is None:
            return
        try:
            if leg.fetch is not None:
                leg.fetch.cancel()
            else:
                self._runner.remove(leg.sequence)
        finally:
            # A lease whose prefill has not ended never expires: a bug above must not keep it.
            self._owner.abort(leg.lease.lease_id, reason, outcome)

    def withdraw(self, sink: RouterSink, number: int) -> None:
        """Stop a leg for which nothing was computed yet, and say so; one that has begun goes on."""
        leg = self._legs.get(_LegKey(id(sink), number))
        if leg is None or leg.sequence.started_at_s is not None:
            return
        sink.send(Withdrawn(number=number))  # before its reader hears that the lease has ended
        self.cancel(sink, number, "the router withdrew it", LeaseOutcome.WITHDRAWN)

    def sink_lost(self, sink: RouterSink) -> None:
        """The router's stream ended: so do its legs."""
        with ExitStack() as all_of_them:  # also when one raises
            for key in self._legs:
                if key.sink == id(sink):
                    all_of_them.callback(self.cancel, sink, key.number, "the router's stream ended")

    # -- bringing a prefix ----------------------------------------------------------------------

    async def _fetch(self, leg: "_PrefillLeg", source: PrefixSource, cache_salt: str) -> None:
        """The fetch task of one leg; whatever it brings, the prompt is computed next."""
        sequence, size = leg.sequence, self._info.layout.block_size
        left_tokens = max(1, sequence.context_tokens - source.num_blocks * size)
        self.pulls += 1
        self.pulling_tokens += left_tokens
        try:
            root = root_hash(self._info.model_id, cache_salt)
            leg.brought = await self._prefixes.bring(sequence, root, source)
        except Exception:
            log.exception("prefix_fetch_bug sequence=%s", sequence.sequence_id)
        finally:
            self.pulls -= 1
            self.pulling_tokens -= left_tokens
        leg.fetch = None
        self._runner.submit(sequence, leg)
        self._pool.release(leg.brought.blocks)

    # -- called by the legs ---------------------------------------------------------------------

    def announce(self, leg: "_PrefillLeg", sequence: Sequence) -> None:
        """Blocks that are full are final."""
        full = min(sequence.computed, sequence.context_tokens) // self._info.layout.block_size
        fresh = sequence.blocks[len(leg.lease.blocks) : full]
        if fresh and sequence.computed < sequence.context_tokens:
            self._owner.announce(leg.lease, fresh)
            sequence.on_starved = partial(self._starved, leg)

    def _starved(self, leg: "_PrefillLeg") -> None:
        """It was preempted, and what its lease keeps is needed by those that it waits for."""
        self._runner.remove(leg.sequence)
        self.fail(leg, Overloaded("other sequences need the memory of this prompt here"))

    def complete(
        self, leg: "_PrefillLeg", sequence: Sequence, sampled: Sampled, finish: FinishReason | None
    ) -> None:
        """The first token: to the router at once, to the reader with the last blocks."""
        leg.answered = True
        rest = sequence.blocks[len(leg.lease.blocks) :]
        self._owner.finish(leg.lease, rest, (sampled.token,), ended=finish is not None)
        self._runner.remove(sequence)
        leg.sink.tokens(
            LegTokens(
                number=leg.number,
                tokens=(sampled.token,),
                finish=finish,
                times=self._times(leg),
                logits=sampled.logits,
            )
        )
        self.lease_ended(leg)

    def fail(self, leg: "_PrefillLeg", error: BatonError) -> None:
        """The router hears why; the reader that its lease has ended."""
        self._legs.pop(leg.key, None)
        self._owner.abort(leg.lease.lease_id, error.message)
        leg.sink.send(
            LegFailed(
                number=leg.number, code=error.code, message=error.message, stage=Stage.PREFILL
            )
        )

    def lease_ended(self, leg: "_PrefillLeg") -> None:
        """Forget a leg of which nothing is left: neither a prefill nor a lease."""
        if leg.answered and self._owner.table.get(leg.lease.lease_id) is None:
            self._legs.pop(leg.key, None)

    def _times(self, leg: "_PrefillLeg") -> LegTimes:
        sequence, brought = leg.sequence, leg.brought
        started_s = sequence.started_at_s or sequence.arrived_at_s
        return LegTimes(
            queue_s=started_s - sequence.arrived_at_s - brought.seconds,
            prefill_s=self._clock.now_s() - started_s,
            work=self._runner.work_of(sequence),
            transfer_s=brought.seconds,
            transfer_bytes=brought.stats.nbytes,
            transfer_blocks=brought.stats.blocks,
            transfer_descriptors=brought.stats.descriptors,
            cached_tokens=sequence.cached_tokens,
            fetched_tokens=max(0, min(sequence.cached_tokens, brought.end) - brought.start),
        )


class _PrefillLeg:
    """One submit. Hears of its sequence (engine.runner.SequenceListener) and of its lease
    (kv_transfer.leases.LeaseListener).
    """

    lease: Lease

    def __init__(
        self, role: PrefillRole, sink: RouterSink, number: int, sequence: Sequence
    ) -> None:
        self.role = role
        self.sink = sink
        self.number = number
        self.sequence = sequence
        self.key = _LegKey(id(sink), number)
        self.fetch: asyncio.Task[None] | None = None
        self.brought = Brought()
        self.answered = False

    def on_blocks(self, sequence: Sequence) -> None:
        self.role.announce(self, sequence)

    def on_token(self, sequence: Sequence, sampled: Sampled, finish: FinishReason | None) -> None:
        self.role.complete(self, sequence, sampled, finish)

    def on_failed(self, sequence: Sequence, error: BatonError) -> None:
        self.role.fail(self, error)

    def on_preempted(self, sequence: Sequence) -> None:
        """What was announced stays leased, and final: the sequence finds it in the cache again."""

    def on_ready(self, lease: Lease) -> None:
        """Asked of running sequences only."""

    def on_ended(self, lease: Lease, outcome: LeaseOutcome) -> None:
        self.role.lease_ended(self)
