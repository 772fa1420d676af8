"""A running answer that moves to another decode worker, driven by the production offer.

    begin -> blocks reserved there -> decode_worker.migration.Migration announces what is final
          -> copied over the links -> its next step is the last one here -> the rest is copied
          -> closing question: held -> it goes on there      | else: it goes on here

This is what lies around the offer: the owner's lease table, the reader, and the router that opens
the leg at the destination. A destination without memory for it is no destination: nobody waits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from core.ids import BlockId, LeaseId, SequenceId
from decode_worker.config import DecodeConfig
from decode_worker.migration import Migration, refuse_offer
from kv_transfer.leases import Lease, LeaseListener
from simulator.events import Events
from simulator.fleet import Member
from simulator.links import Link, send
from simulator.sequence import SimSequence

_STOP_S = DecodeConfig().migration_stop_s
_SLACK_BLOCKS = 2
"""Reserved for what it generates while it is copied."""


@dataclass(slots=True)
class _Later:
    """Implements decode_worker.migration.Patience."""

    call: Callable[[], None]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def ring(self) -> None:
        if not self.cancelled:
            self.call()


class AnswerMove:
    """One move of `sequence`, which `arriving` goes on with at the target. `on_over` hears once
    whether it does, and for how long the answer stood still.
    """

    def __init__(
        self,
        events: Events,
        *,
        source: Member,
        target: Member,
        path: tuple[Link, ...],
        control_s: float,
        sequence: SimSequence,
        arriving: SimSequence,
        on_over: Callable[[bool, float], None],
    ) -> None:
        self._events = events
        self._source = source
        self._target = target
        self._path = path
        self._control_s = control_s
        self._sequence = sequence
        self._arriving = arriving
        self._on_over = on_over
        self._evicted = sequence.on_preempted
        self._reserved: tuple[list[BlockId], list[BlockId]] = ([], [])
        self._arrives_s = self._stopped_at_s = 0.0
        self._offer: Migration[SimSequence] | None = None

    def begin(self) -> bool:
        """Whether it is on its way now."""
        source, target = self._source.worker, self._target.worker
        if refuse_offer(self._sequence) or self._target.is_dead:
            return False
        size = target.spec.block_size
        hashes = self._sequence.block_hashes(self._sequence.published, size)
        blocks = -(-self._arriving.context_tokens // size) + _SLACK_BLOCKS
        reserved = target.reserve(hashes, blocks, self._arriving)
        if reserved is None:
            return False
        self._reserved = reserved
        target.pulling(1, self._arriving.context_tokens)
        self._offer = Migration(
            self._sequence,
            runner=source,
            owner=self,
            layout=self._source.hello.layout,
            call_later=self._call_later,
            stop_s=_STOP_S,
            on_over=self._over,
        )
        self._sequence.on_preempted = self._preempted
        if not self._offer.lease.blocks:
            self._ready()
        return True

    def drop(self, reason: str) -> None:
        """The answer ends, or is given up."""
        if self._offer is not None:
            self._offer.drop(reason)

    def _preempted(self) -> None:
        self.drop("the sequence was preempted")
        if self._evicted is not None:
            self._evicted()

    def _call_later(self, delay_s: float, call: Callable[[], None]) -> _Later:
        later = _Later(call)
        self._events.at(self._events.now_s() + delay_s, _Later.ring, later)
        return later

    # -- the owner, as the offer sees it (decode_worker.migration.Leases) ------------------------

    def open(
        self,
        sequence_id: SequenceId,
        listener: LeaseListener | None = None,
        *,
        moves: bool = False,
    ) -> Lease:
        """Bound at once: nobody else will read it."""
        lease = self._source.leases.open(sequence_id, listener, moves=moves)
        lease.reader = self._target.record.worker_id
        return lease

    def announce(self, lease: Lease, block_ids: Sequence[BlockId]) -> None:
        """Copied, but for what the target had."""
        self._source.leases.extend(lease, block_ids)
        self._copy(len(block_ids) - len(self._reserved[0]))
        self._events.at(self._arrives_s, AnswerMove._ready, self)

    def finish(
        self, lease: Lease, block_ids: Sequence[BlockId], tokens: tuple[int, ...], *, ended: bool
    ) -> None:
        """The last of it; then the closing question."""
        self._source.leases.extend(lease, block_ids)
        self._source.leases.finish(lease, tokens, answer_ended=ended)
        self._copy(len(block_ids))
        self._events.at(self._arrives_s + self._control_s, AnswerMove._close, self)

    def abort(self, lease_id: LeaseId, reason: str) -> None:
        self._source.leases.abort(lease_id)

    # -- the reader -----------------------------------------------------------------------------

    def _copy(self, blocks: int) -> None:
        spec, now_s = self._source.worker.spec, self._events.now_s()
        nbytes = max(0, blocks) * spec.block_size * spec.kv_bytes_per_token
        self._arrives_s = max(now_s, send(self._path, now_s, nbytes))

    def _ready(self) -> None:
        """All that was announced is there: the next step is the last one at the source."""
        if self._offer is not None:
            self._offer.on_ready(self._offer.lease)
            self._source.worker.after_step(self._stepped)

    def _stepped(self) -> None:
        """A step has ended. The answer may have ended with it, or be evicted."""
        offer, sequence = self._offer, self._sequence
        if offer is None:
            return
        self._source.worker.bring_up(sequence)
        if refuse_offer(sequence):
            self.drop("it does not run")
            return
        self._stopped_at_s = self._events.now_s()
        offer.advance()

    def _close(self) -> None:
        if self._offer is None:
            return
        if self._target.is_dead or not self._fits():
            self.drop("the destination has no room")
            return
        reader = self._target.record.worker_id
        self._source.leases.close(self._offer.lease.lease_id, reader)

    def _fits(self) -> bool:
        """What it generated meanwhile may need more blocks than were reserved."""
        cached, fresh = self._reserved
        worker = self._target.worker
        missing = -(-self._sequence.computed // worker.spec.block_size) - len(cached) - len(fresh)
        more = worker.reserve((), missing) if missing > 0 else ([], [])
        if more is None:
            return False
        fresh.extend(more[1])
        return True

    def _over(self, moved: bool) -> None:
        """The lease has ended: HELD, or it goes on where it was."""
        self._offer = None
        self._sequence.on_preempted = self._evicted
        target = self._target.worker
        target.pulling(-1, -self._arriving.context_tokens)
        if moved:
            self._on_over(True, self._events.now_s() - self._stopped_at_s)
            self._join()
        else:
            self._on_over(False, 0.0)
            self._give_back()
        self._source.queue.look()

    def _give_back(self) -> None:
        """A read that is under way may still write there."""
        target, (cached, fresh) = self._target.worker, self._reserved
        target.receiving.remove(self._arriving)
        target.pool.release(cached)
        if self._arrives_s <= self._events.now_s():
            target.pool.abandon(fresh)
        else:
            target.pool.quarantine(fresh)
            self._events.at(self._arrives_s, AnswerMove._read_ended, self)
        self._target.queue.look()

    def _read_ended(self) -> None:
        self._target.worker.pool.release_quarantined(self._reserved[1])
        self._target.queue.look()
        self._target.worker.look()

    def _join(self) -> None:
        worker, gone, here = self._target.worker, self._sequence, self._arriving
        cached, fresh = self._reserved
        here.known_tokens, here.outputs_left = gone.known_tokens, gone.outputs_left
        here.computed, here.published = gone.computed, len(cached)
        worker.pool.received(fresh)
        here.blocks = [*cached, *fresh]
        here.publish(worker.pool, worker.spec.block_size)
        worker.join(here)
        worker.tell_kv()
