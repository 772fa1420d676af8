"""The owner's side of a hand-off: leases towards readers.

The roles open, announce and finish; readers bind or fetch, renew and close. A reader's stream that
ends takes its leases with it at once: its reads, if any still run, can no longer be confirmed, so
nobody will use what they bring.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import count

from core.ids import BlockId, LeaseId, SequenceId
from kv_transfer.leases import Lease, LeaseListener, LeaseTable, reader_name
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    Fetch,
    Fetched,
    FromOwner,
    FromReader,
    LeaseOutcome,
    PeerHello,
    Ready,
    Renew,
    Renewed,
)

log = logging.getLogger(__name__)

Send = Callable[[FromOwner], None]


class Owner:
    """All leases of one worker. Called on the event loop; `send` never waits."""

    def __init__(self, table: LeaseTable, on_freed: Callable[[], None]) -> None:
        self.table = table
        self._on_freed = on_freed
        self._readers: dict[str, Send] = {}
        self._numbers = count(1)

    # -- roles ----------------------------------------------------------------------------------

    def open(
        self,
        sequence_id: SequenceId,
        listener: LeaseListener | None = None,
        *,
        moves: bool = False,
    ) -> Lease:
        """A prefill was accepted, or a running sequence is offered, which HELD then `moves`."""
        return self.table.open(sequence_id, listener, moves=moves)

    def announce(self, lease: Lease, block_ids: Sequence[BlockId]) -> None:
        """More blocks of the sequence are final; the reader, if bound, hears of them now."""
        first = len(lease.blocks)
        self.table.extend(lease, block_ids)
        self._tell(lease, first)

    def finish(
        self, lease: Lease, block_ids: Sequence[BlockId], tokens: tuple[int, ...], *, ended: bool
    ) -> None:
        """The last blocks, and the tokens that follow. An ended answer is not read."""
        first = len(lease.blocks)
        self.table.extend(lease, block_ids)
        self.table.finish(lease, tokens, answer_ended=ended)
        self._tell(lease, first)
        if ended:
            self.table.finish_unread(lease)
            self._on_freed()

    def abort(
        self, lease_id: LeaseId, reason: str, outcome: LeaseOutcome = LeaseOutcome.ABORTED
    ) -> None:
        """End a lease from this side; a bound reader is told."""
        lease = self.table.abort(lease_id, outcome)
        if lease is not None:
            self._send(lease.reader, Abort(lease_id=lease_id, reason=reason, outcome=outcome))
            self._on_freed()

    def sweep(self) -> None:
        """Expire what nobody renewed. Called on a timer, also while the engine is idle."""
        for lease in self.table.sweep():
            log.warning("lease_expired lease_id=%s sequence=%s", lease.lease_id, lease.sequence_id)
            expired = Abort(
                lease_id=lease.lease_id,
                reason="the lease expired",
                outcome=LeaseOutcome.EXPIRED,
            )
            self._send(lease.reader, expired)
            self._on_freed()

    # -- readers --------------------------------------------------------------------------------

    def attach(self, hello: PeerHello, send: Send) -> str:
        """A reader's stream; answers the name its leases will be bound under."""
        reader = reader_name(hello.worker_id, hello.incarnation, next(self._numbers))
        self._readers[reader] = send
        return reader

    def detach(self, reader: str) -> None:
        """The stream ended."""
        del self._readers[reader]
        with ExitStack() as all_of_them:  # also when a listener of one raises
            all_of_them.callback(self._on_freed)
            for lease in self.table.all():
                if lease.reader == reader:
                    log.info("lease_reader_lost lease_id=%s reader=%s", lease.lease_id, reader)
                    all_of_them.callback(self.table.abort, lease.lease_id)

    def handle(self, reader: str, message: FromReader) -> None:
        """One message of a bound reader's stream."""
        match message:
            case Bind():
                self._bind(reader, message)
            case Fetch():
                self._fetch(reader, message)
            case Ready():
                lease = self._bound(message.lease_id, reader)
                if lease is not None and lease.listener is not None:
                    lease.listener.on_ready(lease)
            case Renew():
                self.table.renew(message.lease_ids, reader)
                self._send(reader, Renewed())
            case Close():
                self.close(reader, message, ())
            case Abort():
                if self._bound(message.lease_id, reader) is not None:
                    self.table.abort(message.lease_id)
                    self._on_freed()
            case PeerHello():
                log.warning("peer_hello_repeated reader=%s", reader)

    def close(self, reader: str, question: Close, checksums: tuple[int, ...]) -> None:
        """Answer the closing question. `checksums` are those it asked for."""
        lease_id = question.lease_id

        def tell(outcome: LeaseOutcome) -> None:
            answer = Closed(lease_id=lease_id, outcome=outcome, checksums=checksums)
            self._send(reader, answer)

        self.sweep()
        self.table.close(lease_id, reader, tell)
        self._on_freed()

    def may_verify(self, reader: str, question: Close) -> bool:
        """Whether the blocks named are those of the reader's own lease, each once."""
        lease = self._bound(question.lease_id, reader)
        if lease is None or len(question.verify) > len(lease.blocks):
            return False
        return set(question.verify) <= set(lease.blocks)

    def _bound(self, lease_id: LeaseId, reader: str) -> Lease | None:
        lease = self.table.get(lease_id)
        return lease if lease is not None and lease.reader == reader else None

    def _bind(self, reader: str, bind: Bind) -> None:
        unread = self.table.ended_unread(bind.lease_id)
        if unread is not None and unread.sequence_id == bind.sequence_id:
            self._send(reader, _announce(unread, 0))
            return
        lease = self.table.get(bind.lease_id)
        bindable = lease is not None and lease.reader in (None, reader)
        if lease is None or not bindable or lease.sequence_id != bind.sequence_id:
            self._send(reader, self._not_bound(bind.lease_id))
            return
        lease.reader = reader
        self.table.renew([lease.lease_id], reader)
        self._tell(lease, bind.first_index)

    def _not_bound(self, lease_id: LeaseId) -> Abort:
        """A reader that comes after the end hears of it as one that was there has heard."""
        outcome = self.table.how_ended(lease_id)
        if outcome in (LeaseOutcome.EXPIRED, LeaseOutcome.WITHDRAWN):
            reason = f"it was {outcome.name.lower()} before its reader came"
            return Abort(lease_id=lease_id, reason=reason, outcome=outcome)
        reason = "no such lease, or it is of another sequence or reader"
        return Abort(lease_id=lease_id, reason=reason)

    def _fetch(self, reader: str, fetch: Fetch) -> None:
        lease = self.table.open_cached(fetch.sequence_id, fetch.hashes, reader)
        blocks = tuple(lease.blocks[fetch.first_index :])
        if not blocks:
            self.table.abort(lease.lease_id)
        fetched = Fetched(
            number=fetch.number,
            lease_id=lease.lease_id,
            block_ids=blocks,
            seal=lease.seal,
        )
        self._send(reader, fetched)

    def _tell(self, lease: Lease, first_index: int) -> None:
        if self.table.get(lease.lease_id) is not lease:
            return
        announce = _announce(lease, first_index)
        if announce.block_ids or announce.final:
            self._send(lease.reader, announce)

    def _send(self, reader: str | None, message: FromOwner) -> None:
        if reader is not None and reader in self._readers:
            self._readers[reader](message)


def _announce(lease: Lease, first_index: int) -> Announce:
    return Announce(
        lease_id=lease.lease_id,
        sequence_id=lease.sequence_id,
        first_index=min(first_index, len(lease.blocks)),
        block_ids=tuple(lease.blocks[first_index:]),
        final=lease.tokens is not None,
        tokens=lease.tokens or (),
        ended=lease.answer_ended,
        seal=lease.seal,
    )
