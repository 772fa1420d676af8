"""A worker as decode worker: submit -> pull the KV (or compute it) -> generate until the end.

A running leg may be offered to another decode worker, which pulls its KV while it runs here
(migration.py); a leg with a live hand-off is the other end of that.
"""

import asyncio
import logging
from contextlib import ExitStack
from types import TracebackType

from core.clock import Clock
from core.errors import BatonError, InternalError
from core.messages import (
    Accepted,
    DecodeSubmit,
    Handoff,
    LegFailed,
    LegTimes,
    LegTokens,
    Moved,
    Offered,
    Rejected,
)
from core.sampling import FinishReason
from core.sink import RouterSink
from core.stages import Stage
from decode_worker.config import DecodeConfig
from decode_worker.migration import Migration, refuse_offer
from decode_worker.policy import refuse_sequence
from engine.pool import BlockPool
from engine.runner import Runner
from engine.sequence import Sequence
from engine.types import EngineInfo, Sampled
from kv_transfer.owner import Owner
from kv_transfer.reader import Pulled, PullRequest, Reader

log = logging.getLogger(__name__)


class DecodeRole:
    """All decode legs of one worker. Entered once (`async with`); it owns the pull tasks."""

    def __init__(
        self,
        *,
        info: EngineInfo,
        runner: Runner,
        pool: BlockPool,
        reader: Reader,
        owner: Owner,
        config: DecodeConfig,
        clock: Clock,
    ) -> None:
        self._info = info
        self._runner = runner
        self._pool = pool
        self._reader = reader
        self._owner = owner
        self._config = config
        self._clock = clock
        self._capacity_tokens = min(info.context_tokens, info.num_blocks * info.layout.block_size)
        self._legs: dict[tuple[int, int], _DecodeLeg] = {}
        self.pulls = 0
        """Pulls that run; a cancelled one counts until it has given everything back."""
        self.pulling_tokens = 0
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> "DecodeRole":
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for leg in self._legs.values():
            if leg.pull is not None:
                leg.pull.cancel()
        await self._tasks.__aexit__(kind, error, trace)

    @property
    def open_legs(self) -> int:
        """Legs pulling, waiting or running."""
        return len(self._legs)

    def submit(self, submit: DecodeSubmit, sink: RouterSink) -> None:
        """Accept, or reject with the true reason."""
        refusal = refuse_sequence(
            len(submit.tokens),
            submit.sampling.max_tokens - submit.output_position,
            self._capacity_tokens,
            self.open_legs,
            self._config,
        )
        if refusal is not None:
            sink.send(Rejected(number=submit.number, code=refusal.code, message=refusal.message))
            return
        sequence = Sequence.of(submit, self._info.model_id, self._clock.now_s())
        leg = _DecodeLeg(self, sink, submit.number, sequence)
        self._legs[id(sink), submit.number] = leg
        sink.send(Accepted(number=submit.number))
        if submit.handoff is None:
            leg.is_computed = True
            self._runner.submit(sequence, leg)
        else:
            leg.pull = self._tasks.create_task(self._bring(leg, submit.handoff))

    def cancel(self, sink: RouterSink, number: int) -> None:
        """Stop a leg; its blocks are given back, those under a read when that has ended."""
        leg = self._legs.pop((id(sink), number), None)
        if leg is None:
            return
        try:
            leg.drop_migration("the leg was cancelled")
        finally:  # a bug above must not keep its blocks
            if leg.pull is not None:
                leg.pull.cancel()
            else:
                self._runner.remove(leg.sequence)

    def sink_lost(self, sink: RouterSink) -> None:
        """The router's stream ended: so do its legs."""
        with ExitStack() as all_of_them:  # also when one raises
            for sink_id, number in self._legs:
                if sink_id == id(sink):
                    all_of_them.callback(self.cancel, sink, number)

    def offer(self, sink: RouterSink, number: int) -> None:
        """Open a lease on a running leg's KV for another decode worker, or say why not.

        An offer that nobody has taken yet is replaced: whoever asks again has given it up.
        """
        leg = self._legs.get((id(sink), number))
        refusal = "no such leg runs here" if leg is None else refuse_offer(leg.sequence)
        if leg is None or refusal:
            sink.send(Offered(number=number, lease_id=None, message=refusal))
            return
        leg.drop_migration("it is offered anew")
        leg.migration = Migration(
            leg.sequence,
            runner=self._runner,
            owner=self._owner,
            layout=self._info.layout,
            call_later=asyncio.get_running_loop().call_later,
            stop_s=self._config.migration_stop_s,
            on_over=leg.migration_over,
        )
        lease_id = leg.migration.lease.lease_id
        sink.send(Offered(number=number, lease_id=lease_id, lease_s=self._owner.table.lease_s))

    # -- bringing the KV ------------------------------------------------------------------------

    async def _bring(self, leg: "_DecodeLeg", handoff: Handoff) -> None:
        """The pull task of one leg. Whatever happens, the router hears of it or has cancelled."""
        sequence = leg.sequence
        self.pulls += 1
        self.pulling_tokens += sequence.context_tokens
        try:
            pulled = await self._pull(sequence, handoff)
            leg.pull = None
            self._start(leg, pulled)
        except BatonError as error:
            leg.pull = None
            self.fail(leg, error, Stage.KV_TRANSFER)
        except Exception:
            log.exception("kv_pull_bug sequence=%s", sequence.sequence_id)
            leg.pull = None
            self.fail(leg, InternalError("the KV pull failed"), Stage.KV_TRANSFER)
        finally:
            self.pulls -= 1
            self.pulling_tokens -= sequence.context_tokens

    async def _pull(self, sequence: Sequence, handoff: Handoff) -> Pulled:
        size = self._info.layout.block_size
        return await self._reader.pull(
            PullRequest(
                handoff=handoff,
                sequence_id=sequence.sequence_id,
                hashes=sequence.block_hashes(sequence.context_tokens // size, size),
                context_tokens=sequence.context_tokens,
                timeout_s=max(0.0, sequence.deadline_at_s - self._clock.now_s()),
            )
        )

    def _start(self, leg: "_DecodeLeg", pulled: Pulled) -> None:
        """Join the running batch, unless the answer has ended with what was pulled.

        Of a prefill one token follows the context, of a live hand-off all that its owner generated;
        the blocks hold the KV of all but the last of them.
        """
        sequence, stats, size = leg.sequence, pulled.stats, self._info.layout.block_size
        finishes = [sequence.append(Sampled(token=token)) for token in pulled.tokens]
        if pulled.ended or any(finishes):
            self._legs.pop((id(leg.sink), leg.number), None)
            self._pool.release(pulled.blocks)
            return
        sequence.blocks = list(pulled.blocks)
        sequence.computed = len(sequence.tokens) - 1
        sequence.published = pulled.cached_blocks
        sequence.publish(self._pool, size)
        sequence.cached_tokens = pulled.cached_blocks * size
        leg.times = LegTimes(
            transfer_s=stats.seconds,
            transfer_bytes=stats.nbytes,
            transfer_blocks=stats.blocks,
            transfer_descriptors=stats.descriptors,
            transfer_hidden_s=stats.hidden_s,
            cached_tokens=sequence.cached_tokens,
        )
        self._runner.submit_ready(sequence, leg)

    # -- called by the legs ---------------------------------------------------------------------

    def token(self, leg: "_DecodeLeg", sampled: Sampled, finish: FinishReason | None) -> None:
        """One token to the router; times ride on the first."""
        times, leg.times = leg.times, None
        if leg.is_computed:
            times, leg.is_computed = self._computed(leg.sequence), False
        leg.sink.tokens(
            LegTokens(
                number=leg.number,
                tokens=(sampled.token,),
                finish=finish,
                times=times,
                logits=sampled.logits,
            )
        )
        if finish is not None:
            self._legs.pop((id(leg.sink), leg.number), None)
            leg.drop_migration("the answer has ended")
        elif leg.migration is not None:
            leg.migration.advance()

    def _computed(self, sequence: Sequence) -> LegTimes:
        """Of a prompt that was computed here, at its first token."""
        started_s = sequence.started_at_s or sequence.arrived_at_s
        return LegTimes(
            queue_s=started_s - sequence.arrived_at_s,
            prefill_s=self._clock.now_s() - started_s,
            work=self._runner.work_of(sequence),
            cached_tokens=sequence.cached_tokens,
        )

    def moved(self, leg: "_DecodeLeg") -> None:
        """Another worker has the sequence; its last token here is in front of this."""
        self._legs.pop((id(leg.sink), leg.number), None)
        leg.sink.send(Moved(number=leg.number))

    def fail(self, leg: "_DecodeLeg", error: BatonError, stage: Stage) -> None:
        """The router hears why."""
        self._legs.pop((id(leg.sink), leg.number), None)
        leg.drop_migration(error.message)
        leg.sink.send(
            LegFailed(number=leg.number, code=error.code, message=error.message, stage=stage)
        )


class _DecodeLeg:
    """One submit; hears of its sequence (engine.runner.SequenceListener)."""

    def __init__(self, role: DecodeRole, sink: RouterSink, number: int, sequence: Sequence) -> None:
        self.role = role
        self.sink = sink
        self.number = number
        self.sequence = sequence
        self.pull: asyncio.Task[None] | None = None
        self.times: LegTimes | None = None
        self.is_computed = False
        """Its prompt is computed here, and its first token has not been sent."""
        self.migration: Migration[Sequence] | None = None

    def drop_migration(self, reason: str) -> None:
        """Nobody else will have this sequence: it is about to end, or to be offered anew."""
        if self.migration is not None:
            self.migration.drop(reason)

    def migration_over(self, moved: bool) -> None:
        self.migration = None
        if moved:
            self.role.moved(self)

    def on_blocks(self, sequence: Sequence) -> None:
        """KV computed here is for nobody else."""

    def on_token(self, sequence: Sequence, sampled: Sampled, finish: FinishReason | None) -> None:
        self.role.token(self, sampled, finish)

    def on_failed(self, sequence: Sequence, error: BatonError) -> None:
        self.role.fail(self, error, Stage.DECODE)
