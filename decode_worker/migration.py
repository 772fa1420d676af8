"""Live migration of a running sequence to another decode worker: the side that gives it away.

    offered --Ready--> stopping --next token--> stopped --Close: HELD--> moved
       '-------------------------------------------'--- anything else --> runs on here

The KV is append-only, so all full blocks are copied while decoding goes on, and the sequence stops
only for what its last steps made (Llumnix, OSDI'24, section 4.2). Its handshake in our terms:
PRE-ALLOC is the router's DecodeSubmit and the reader's reservation, ACK is Accepted and Bind, ABORT
is the end of the lease by whoever, COMMIT is its Close answered HELD, which happens here and alone
decides who owns the sequence.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from core.ids import BlockId, LeaseId, SequenceId
from core.kv import KvLayout
from engine.sequence import SequenceState
from kv_transfer.leases import Lease, LeaseListener
from kv_transfer.messages import LeaseOutcome

log = logging.getLogger(__name__)


class Movable(Protocol):
    """What is read of a running sequence; see engine.sequence.Sequence."""

    state: SequenceState
    context_tokens: int
    computed: int
    published: int
    blocks: list[BlockId]
    on_preempted: Callable[[], None] | None

    @property
    def sequence_id(self) -> SequenceId: ...

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def pending_tokens(self) -> int: ...


S = TypeVar("S", bound=Movable)
S_contra = TypeVar("S_contra", bound=Movable, contravariant=True)


class Batch(Protocol[S_contra]):
    """Where it runs; see engine.runner.Runner."""

    def hold(self, sequence: S_contra) -> None: ...

    def resume(self, sequence: S_contra) -> None: ...

    def remove(self, sequence: S_contra) -> None: ...


class Leases(Protocol):
    """The owner's side of a lease; see kv_transfer.owner.Owner."""

    def open(
        self,
        sequence_id: SequenceId,
        listener: LeaseListener | None = None,
        *,
        moves: bool = False,
    ) -> Lease: ...

    def announce(self, lease: Lease, block_ids: Sequence[BlockId]) -> None: ...

    def finish(
        self, lease: Lease, block_ids: Sequence[BlockId], tokens: tuple[int, ...], *, ended: bool
    ) -> None: ...

    def abort(self, lease_id: LeaseId, reason: str) -> None: ...


class Patience(Protocol):
    """A call that comes later unless it is cancelled."""

    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Patience]
"""As an event loop's."""


def refuse_offer(sequence: Movable) -> str:
    """Why a sequence cannot be offered now; empty: it can."""
    if sequence.state is SequenceState.HELD:
        return "it is being handed over already"
    if sequence.state is not SequenceState.RUNNING:
        return "it does not run now"
    if sequence.pending_tokens > 1:
        return "its KV is being computed"
    return ""


class Migration(Generic[S]):
    """One offer of one running sequence (implements kv_transfer.leases.LeaseListener).

    `advance` is called after each token that does not end the sequence, `drop` when the sequence
    is about to end. `on_over` is told once: True, the sequence has moved and is gone from here;
    False, it stays.
    """

    def __init__(
        self,
        sequence: S,
        *,
        runner: Batch[S],
        owner: Leases,
        layout: KvLayout,
        call_later: CallLater,
        stop_s: float,
        on_over: Callable[[bool], None],
    ) -> None:
        self._sequence = sequence
        self._runner = runner
        self._owner = owner
        self._layout = layout
        self._call_later = call_later
        self._stop_s = stop_s
        self._on_over = on_over
        self.ready = False
        """The reader has all that was announced: the next step is the last one here."""
        self._patience: Patience | None = None
        self.lease = owner.open(sequence.sequence_id, self, moves=True)
        sequence.on_preempted = lambda: self.drop("the sequence was preempted")
        self._announce()

    def advance(self) -> None:
        """A step has ended: announce what it completed, or stop for the rest.

        Less than a block is not announced: there is nothing to wait for but the reader.
        """
        short = self._sequence.published == 0 and self.lease.reader is not None
        if self.ready or short:
            self._stop()
        else:
            self._announce()

    def drop(self, reason: str) -> None:
        """End the offer; a sequence that is stopped for it runs on."""
        self._owner.abort(self.lease.lease_id, reason)

    # -- the lease ------------------------------------------------------------------------------

    def on_ready(self, lease: Lease) -> None:
        self.ready = True

    def on_ended(self, lease: Lease, outcome: LeaseOutcome) -> None:
        moved = outcome is LeaseOutcome.HELD
        sequence_id = self._sequence.sequence_id
        log.info("migration_ended sequence=%s outcome=%s", sequence_id, outcome.name)
        self._sequence.on_preempted = None
        if self._patience is not None:
            self._patience.cancel()
        if moved:
            self._runner.remove(self._sequence)
        else:
            self._runner.resume(self._sequence)
        self._on_over(moved)

    # -- the copy -------------------------------------------------------------------------------

    def _announce(self) -> None:
        fresh = self._sequence.blocks[len(self.lease.blocks) : self._sequence.published]
        if fresh:
            self._owner.announce(self.lease, fresh)

    def _stop(self) -> None:
        """Hold the sequence and announce the rest; no token follows before the lease has ended."""
        sequence = self._sequence
        self._runner.hold(sequence)
        reason = f"no other worker had the sequence within {self._stop_s:g} s"
        self._patience = self._call_later(self._stop_s, lambda: self.drop(reason))
        used = self._layout.num_blocks(sequence.computed)
        self._owner.finish(
            self.lease,
            sequence.blocks[len(self.lease.blocks) : used],
            tuple(sequence.tokens[sequence.context_tokens :]),
            ended=False,
        )
