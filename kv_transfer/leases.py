"""Leases: the promise that announced blocks stay what they are until the reader has them.

    open --(sequence runs: cannot expire)-> finish --> close    HELD
      |                                       |------> expired  no renewal for `lease_s`
      '---------------- abort, at any time ---'------> aborted

A closed lease is remembered for twice its length, so that `close` may be asked again and gets the
same answer. All times come from the clock passed in; one thread calls all of this.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.clock import Clock
from core.ids import BlockHash, BlockId, Incarnation, LeaseId, SequenceId, WorkerId
from engine.pool import BlockPool
from kv_transfer.messages import LeaseOutcome, Seal
from kv_transfer.metrics import LeaseCounters, LeaseEnd
from kv_transfer.seals import Seals

NEVER_S = float("inf")
_ENDS = {
    LeaseOutcome.HELD: LeaseEnd.CLOSED,
    LeaseOutcome.ABORTED: LeaseEnd.ABORTED,
    LeaseOutcome.EXPIRED: LeaseEnd.EXPIRED,
    LeaseOutcome.WITHDRAWN: LeaseEnd.WITHDRAWN,
}


def reader_name(worker_id: WorkerId, incarnation: Incarnation, number: int) -> str:
    """What leases are bound under by one stream of a reader."""
    return f"{worker_id}/{incarnation}#{number}"


def worker_of(reader: str | None) -> WorkerId:
    """The worker of a reader's name; empty where there is none."""
    return WorkerId((reader or "").rpartition("/")[0])


class LeaseListener(Protocol):
    """Whoever opened a lease hears of it, on the event loop, from inside the call that did it."""

    def on_ready(self, lease: "Lease") -> None:
        """The reader has all that was announced of a running sequence."""
        ...

    def on_ended(self, lease: "Lease", outcome: LeaseOutcome) -> None:
        """Said once. HELD: the reader owns a copy; else nobody does."""
        ...


@dataclass(slots=True)
class Lease:
    """One open lease. `reader` names who is bound to it; `tokens` is None until the final
    announcement, then what follows the reader's submit. `seal` is whole from then to the end; there
    is none if HELD `moves` a running sequence, as then the owner must know.
    """

    lease_id: LeaseId
    sequence_id: SequenceId
    opened_at_s: float
    expires_at_s: float = NEVER_S
    blocks: list[BlockId] = field(default_factory=list)
    reader: str | None = None
    tokens: tuple[int, ...] | None = None
    answer_ended: bool = False
    listener: LeaseListener | None = None
    moves: bool = False
    seal: Seal | None = None


@dataclass(frozen=True, slots=True)
class _Ended:
    """What is remembered of a lease; `unread` if there was nothing to hand off."""

    forget_at_s: float
    outcome: LeaseOutcome
    reader: str | None
    unread: Lease | None


class LeaseTable:
    """Owns the lease references of one pool. `seals`: those that readers of its arena can read."""

    def __init__(
        self, pool: BlockPool, clock: Clock, lease_s: float, seals: Seals | None = None
    ) -> None:
        self._pool = pool
        self._seals = seals
        self._clock = clock
        self.lease_s = lease_s
        self._open: dict[LeaseId, Lease] = {}
        self._ended: OrderedDict[LeaseId, _Ended] = OrderedDict()
        self._next_id = 1
        self.counters = LeaseCounters()

    def open(
        self,
        sequence_id: SequenceId,
        listener: LeaseListener | None = None,
        *,
        moves: bool = False,
    ) -> Lease:
        """A new lease without blocks; cannot expire until its prefill is finished."""
        lease_id, now_s = LeaseId(self._next_id), self._clock.now_s()
        lease = Lease(lease_id, sequence_id, now_s, listener=listener, moves=moves)
        self._next_id += 1
        self._open[lease.lease_id] = lease
        self.counters.opened += 1
        return lease

    def open_cached(
        self, sequence_id: SequenceId, hashes: Sequence[BlockHash], reader: str
    ) -> Lease:
        """A lease of `reader` on the longest cached prefix of `hashes`; all of it is final.

        The whole prefix is held, not only what the reader lacks: no cached block may have a
        descendant in use.
        """
        lease = self.open(sequence_id)
        self.extend(lease, self._pool.lookup(hashes))
        self.finish(lease, (), answer_ended=False)
        lease.reader = reader
        return lease

    def get(self, lease_id: LeaseId) -> Lease | None:
        """The lease, if it is open."""
        return self._open.get(lease_id)

    def all(self) -> tuple[Lease, ...]:
        """Open leases, oldest first."""
        return tuple(self._open.values())

    def extend(self, lease: Lease, block_ids: Sequence[BlockId]) -> None:
        """Hold more blocks, unless the lease has ended meanwhile.

        The caller still has its own reference to them.
        """
        if lease.lease_id in self._open:
            self._pool.lease(block_ids)
            lease.blocks.extend(block_ids)

    def finish(self, lease: Lease, tokens: tuple[int, ...], *, answer_ended: bool) -> None:
        """All blocks are announced; from now on the lease lives by renewal."""
        lease.tokens = tokens
        lease.answer_ended = answer_ended
        lease.expires_at_s = self._clock.now_s() + self.lease_s
        is_read = lease.lease_id in self._open and not answer_ended
        if self._seals is not None and is_read and not lease.moves and lease.seal is None:
            lease.seal = self._seals.set_one()

    def finish_unread(self, lease: Lease) -> None:
        """The prefill has ended, and the answer with it: there is nothing to hand off."""
        if lease.lease_id in self._open:
            self._end(lease, LeaseOutcome.ABORTED, unread=lease)

    def ended_unread(self, lease_id: LeaseId) -> Lease | None:
        """A lease that `finish_unread` ended, while it is remembered, for a reader that is late."""
        ended = self._ended.get(lease_id)
        return None if ended is None else ended.unread

    def renew(self, lease_ids: Sequence[LeaseId], reader: str | None) -> None:
        """Push expiry out; only the bound reader, or anybody (None) while none is bound."""
        for lease_id in lease_ids:
            lease = self._open.get(lease_id)
            if lease is not None and lease.reader == reader and lease.expires_at_s != NEVER_S:
                lease.expires_at_s = self._clock.now_s() + self.lease_s

    def close(
        self,
        lease_id: LeaseId,
        reader: str,
        tell: Callable[[LeaseOutcome], None] = lambda _: None,
    ) -> LeaseOutcome:
        """Answer the closing question; idempotent while the lease is remembered.

        `tell` hears the answer first and the blocks, thousands of a long prompt, are let go after
        it: a decode worker waits for the answer.
        """
        self._forget()
        lease = self._open.get(lease_id)
        outcome = self._outcome(lease_id, lease, reader)
        tell(outcome)
        if lease is not None and outcome in (LeaseOutcome.EXPIRED, LeaseOutcome.HELD):
            self._end(lease, outcome)
        return outcome

    def _outcome(self, lease_id: LeaseId, lease: Lease | None, reader: str) -> LeaseOutcome:
        if lease is None:
            ended = self._ended.get(lease_id)
            if ended is None or ended.reader != reader:
                return LeaseOutcome.UNKNOWN
            return ended.outcome
        if lease.reader != reader or lease.tokens is None:
            return LeaseOutcome.UNKNOWN
        expired = lease.expires_at_s <= self._clock.now_s()
        return LeaseOutcome.EXPIRED if expired else LeaseOutcome.HELD

    def abort(
        self, lease_id: LeaseId, outcome: LeaseOutcome = LeaseOutcome.ABORTED
    ) -> Lease | None:
        """End a lease early; answers it if it was open."""
        lease = self._open.get(lease_id)
        if lease is not None:
            self._end(lease, outcome)
        return lease

    def how_ended(self, lease_id: LeaseId) -> LeaseOutcome:
        """Of a lease that is not open: UNKNOWN if it is not remembered, or never was."""
        ended = self._ended.get(lease_id)
        return LeaseOutcome.UNKNOWN if ended is None else ended.outcome

    def sweep(self) -> list[Lease]:
        """End what has expired and forget what ended long ago; answers the expired leases."""
        now_s = self._clock.now_s()
        expired = [lease for lease in self._open.values() if lease.expires_at_s <= now_s]
        for lease in expired:
            self._end(lease, LeaseOutcome.EXPIRED)
        self._forget()
        return expired

    def _forget(self) -> None:
        now_s = self._clock.now_s()
        while self._ended and next(iter(self._ended.values())).forget_at_s <= now_s:
            self._ended.popitem(last=False)

    def check(self) -> None:
        """Raise InternalError unless the pool's lease references are those of the open leases."""
        held = Counter(block_id for lease in self._open.values() for block_id in lease.blocks)
        self._pool.check_leases(held)

    def _end(self, lease: Lease, outcome: LeaseOutcome, unread: Lease | None = None) -> None:
        del self._open[lease.lease_id]
        if self._seals is not None and lease.seal is not None:
            self._seals.break_one(lease.seal)  # before the blocks: they may be reused from then on
            lease.seal = None
        forget_at_s = self._clock.now_s() + 2 * self.lease_s
        self._ended[lease.lease_id] = _Ended(forget_at_s, outcome, lease.reader, unread)
        how = LeaseEnd.CLOSED if unread is not None else _ENDS[outcome]
        self.counters.end(worker_of(lease.reader), how)
        blocks, lease.blocks = lease.blocks, []
        self._pool.unlease(blocks)
        if lease.listener is not None:
            lease.listener.on_ended(lease, outcome)
