"""KV on its way from a prefill worker to a decode worker, as kv_transfer moves it.

    submit -> first announcement -> blocks reserved -> chunks sent as they are final -> last one
    arrived -> closing question -> held: usable, the sequence joins    | else: failed

Whoever waits for memory waits in order of its first announcement (kv_transfer/reader.py). While the
link of an end is cut nothing arrives, neither bytes nor renewals; the reader's patience ends by the
read timeout, the owner's by the lease.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from core.ids import BlockHash, BlockId
from kv_transfer.messages import LeaseOutcome
from simulator.events import Events
from simulator.leases import Renewal
from simulator.links import Link, send
from simulator.sequence import ANY, SimSequence

if TYPE_CHECKING:
    from simulator.fleet import Member


class PullQueue:
    """Pulls into one worker that found no memory yet."""

    def __init__(self) -> None:
        self._waiting: deque[Handoff] = deque()

    def ask(self, handoff: "Handoff") -> None:
        """Reserve for it, now or when its turn comes."""
        self._waiting.append(handoff)
        if len(self._waiting) == 1:
            self.look()

    def drop(self, handoff: "Handoff") -> None:
        """It needs nothing any more."""
        if handoff in self._waiting:
            self._waiting.remove(handoff)
            self.look()

    @property
    def wanted_tokens(self) -> int:
        """Of the first, which has no room; 0 where nobody waits."""
        return self._waiting[0].sequence.context_tokens if self._waiting else 0

    def look(self) -> None:
        """Blocks may have been freed."""
        while self._waiting and self._waiting[0].reserve():
            self._waiting.popleft()


class Handoff:
    """One prompt's KV. `on_usable` hears that it is there, `on_failed` that it never will be."""

    def __init__(
        self,
        events: Events,
        *,
        source: "Member",
        target: "Member",
        path: tuple[Link, ...],
        control_s: float,
        read_timeout_s: float,
        sequence: SimSequence,
        hashes: Sequence[BlockHash],
        on_usable: "Callable[[Handoff], None]",
        on_failed: "Callable[[Handoff], None]",
    ) -> None:
        self.source = source
        self.target = target
        self.sequence = sequence
        """To run on the target."""
        self._events = events
        self._path = path
        self._control_s = control_s
        self._read_timeout_s = read_timeout_s
        self._hashes = hashes
        self._on_usable = on_usable
        self._on_failed = on_failed
        self._lease = source.leases.open(ANY)
        self._lease.reader = target.record.worker_id
        self._reserved: tuple[list[BlockId], list[BlockId]] | None = None
        self._asked = self._over = False
        self._ready_tokens = self._sent_tokens = 0
        self._arrives_s = self._give_up_s = 0.0
        self.sent_bytes = 0
        target.worker.pulling(1, sequence.context_tokens)

    # -- the owner's side -----------------------------------------------------------------------

    def announce(self, tokens: int) -> None:
        """The KV of the first `tokens` is final at the source."""
        if self._over:
            return
        self._ready_tokens = tokens
        if not self._asked:
            self._asked = True
            self.target.queue.ask(self)
        elif self._reserved is not None:
            self._send()

    def lease(self, blocks: Sequence[BlockId], *, ended: bool) -> None:
        """The source has computed all of it, and keeps it until it is read or nobody renews it; of
        an answer that has ended, nothing is read.
        """
        if self._over:
            return
        table, lease = self.source.leases, self._lease
        table.extend(lease, blocks)
        table.finish(lease, (), answer_ended=ended)
        if ended:
            table.finish_unread(lease)
        else:
            in_reach, freed = self._in_reach, self.source.worker.look
            Renewal(self._events, table, lease, in_reach, freed).begin()

    # -- the reader's side ----------------------------------------------------------------------

    def reserve(self) -> bool:
        """Whether the target had the blocks; then what is ready is sent."""
        if self.target.is_dead:
            return False
        sequence, size = self.sequence, self.target.worker.spec.block_size
        blocks = -(-sequence.context_tokens // size)
        self._reserved = self.target.worker.reserve(self._hashes, blocks, sequence)
        if self._reserved is None:
            return False
        self._sent_tokens = len(self._reserved[0]) * size
        self._send()
        return True

    def abort(self) -> None:
        """Nothing of it is needed any more; both sides give back what they hold."""
        if self._over:
            return
        self._over = True
        self.target.queue.drop(self)
        self._leave()
        if self._reserved is not None:
            pool = self.target.worker.pool
            pool.release(self._reserved[0])
            self.target.worker.receiving.remove(self.sequence)
            self._abandon(self._reserved[1])
            self.target.queue.look()
        if self.source.leases.abort(self._lease.lease_id) is not None:
            self.source.worker.look()

    def _abandon(self, blocks: list[BlockId]) -> None:
        """A read that is under way may still write there."""
        pool, now_s = self.target.worker.pool, self._events.now_s()
        if self._arrives_s <= now_s:
            pool.abandon(blocks)
        else:
            pool.quarantine(blocks)
            self._events.at(self._arrives_s, Handoff._read_ended, self)

    def _read_ended(self) -> None:
        if self._reserved is not None:
            self.target.worker.pool.release_quarantined(self._reserved[1])
            self.target.queue.look()
            self.target.worker.look()

    def _send(self) -> None:
        now_s, tokens = self._events.now_s(), self._ready_tokens
        if tokens > self._sent_tokens:
            nbytes = (tokens - self._sent_tokens) * self.source.worker.spec.kv_bytes_per_token
            self._arrives_s = max(self._arrives_s, send(self._path, now_s, nbytes))
            self._sent_tokens = tokens
            self.sent_bytes += nbytes
        if tokens == self.sequence.context_tokens:
            self._give_up_s = max(now_s, self._arrives_s) + self._read_timeout_s
            self._events.at(max(now_s, self._arrives_s) + self._control_s, Handoff._close, self)

    def _close(self) -> None:
        """The closing question, when all bytes are here; while an end is cut off, later."""
        if self._over or self._reserved is None or self.target.is_dead:
            return
        now_s = self._events.now_s()
        if not self._in_reach() or self.source.is_dead:
            if now_s >= self._give_up_s:
                self._on_failed(self)
            else:
                again_s = max(self.source.port.cut_until_s, self.target.port.cut_until_s)
                again_s = again_s + self._control_s if not self.source.is_dead else self._give_up_s
                self._events.at(min(again_s, self._give_up_s), Handoff._close, self)
            return
        reader = self.target.record.worker_id
        if self.source.leases.close(self._lease.lease_id, reader) is not LeaseOutcome.HELD:
            self._on_failed(self)
            return
        self.source.worker.look()
        self._join(*self._reserved)

    def _join(self, cached: list[BlockId], fresh: list[BlockId]) -> None:
        worker, sequence = self.target.worker, self.sequence
        self._over = True
        self._leave()
        worker.pool.received(fresh)
        sequence.blocks = [*cached, *fresh]
        sequence.computed = sequence.context_tokens
        sequence.published = len(cached)
        sequence.cached_tokens = len(cached) * worker.spec.block_size
        sequence.append()
        sequence.publish(worker.pool, worker.spec.block_size)
        self._on_usable(self)
        worker.join(sequence)
        worker.tell_kv()

    def _in_reach(self) -> bool:
        """Whether the two hear each other."""
        now_s = self._events.now_s()
        cut_s = max(self.source.port.cut_until_s, self.target.port.cut_until_s)
        return now_s >= cut_s and not self.target.is_dead

    def _leave(self) -> None:
        self.target.worker.pulling(-1, -self.sequence.context_tokens)
