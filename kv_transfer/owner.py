"""The owner's side of a hand-off: leases towards readers.

The prefill role opens, announces and finishes; readers bind, renew and close. A reader's stream
that ends takes its leases with it at once: its reads, if any still run, can no longer be confirmed,
so nobody will use what they bring.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import count

from core.ids import BlockId, LeaseId, SequenceId
from kv_transfer.leases import FirstToken, Lease, LeaseTable
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    FromOwner,
    FromReader,
    PeerHello,
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

    # -- prefill role ---------------------------------------------------------------------------

    def open(self, sequence_id: SequenceId) -> Lease:
        """The prefill was accepted."""
        return self.table.open(sequence_id)

    def announce(self, lease: Lease, block_ids: Sequence[BlockId]) -> None:
        """More blocks of the sequence are final; the reader, if bound, hears of them now."""
        first = len(lease.blocks)
        self.table.extend(lease, block_ids)
        self._tell(lease, first)

    def finish(self, lease: Lease, block_ids: Sequence[BlockId], first_token: FirstToken) -> None:
        """The last blocks, and the token the prefill ended with. An ended answer is not read."""
        first = len(lease.blocks)
        self.table.extend(lease, block_ids)
        self.table.finish(lease, first_token)
        self._tell(lease, first)
        if first_token.ended:
            self.table.finish_unread(lease)
            self._on_freed()

    def abort(self, lease_id: LeaseId, reason: str) -> None:
        """End a lease from this side; a bound reader is told."""
        lease = self.table.abort(lease_id)
        if lease is not None:
            self._send(lease.reader, Abort(lease_id=lease_id, reason=reason))
            self._on_freed()

    def sweep(self) -> None:
        """Expire what nobody renewed. Called on a timer, also while the engine is idle."""
        for lease in self.table.sweep():
            log.warning("lease_expired lease_id=%s sequence=%s", lease.lease_id, lease.sequence_id)
            self._send(lease.reader, Abort(lease_id=lease.lease_id, reason="the lease expired"))
            self._on_freed()

    # -- readers --------------------------------------------------------------------------------

    def attach(self, hello: PeerHello, send: Send) -> str:
        """A reader's stream; answers the name its leases will be bound under."""
        reader = f"{hello.worker_id}/{hello.incarnation}#{next(self._numbers)}"
        self._readers[reader] = send
        return reader

    def detach(self, reader: str) -> None:
        """The stream ended."""
        del self._readers[reader]
        for lease in self.table.all():
            if lease.reader == reader:
                self.table.abort(lease.lease_id)
                log.info("lease_reader_lost lease_id=%s reader=%s", lease.lease_id, reader)
        self._on_freed()

    def handle(self, reader: str, message: FromReader) -> None:
        """One message of a bound reader's stream."""
        match message:
            case Bind():
                self._bind(reader, message)
            case Renew():
                self.table.renew(message.lease_ids, reader)
                self._send(reader, Renewed())
            case Close():
                self.sweep()
                outcome = self.table.close(message.lease_id, reader)
                self._send(reader, Closed(lease_id=message.lease_id, outcome=outcome))
                self._on_freed()
            case Abort():
                lease = self.table.get(message.lease_id)
                if lease is not None and lease.reader == reader:
                    self.table.abort(message.lease_id)
                    self._on_freed()
            case PeerHello():
                log.warning("peer_hello_repeated reader=%s", reader)

    def _bind(self, reader: str, bind: Bind) -> None:
        unread = self.table.ended_unread(bind.lease_id)
        if unread is not None and unread.sequence_id == bind.sequence_id:
            self._send(reader, _announce(unread, 0))
            return
        lease = self.table.get(bind.lease_id)
        if lease is None or lease.sequence_id != bind.sequence_id or lease.reader is not None:
            reason = "no such lease, or it is of another sequence or reader"
            self._send(reader, Abort(lease_id=bind.lease_id, reason=reason))
            return
        lease.reader = reader
        self.table.renew([lease.lease_id], reader)
        self._tell(lease, bind.first_block)

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
    first_token = lease.first_token
    return Announce(
        lease_id=lease.lease_id,
        sequence_id=lease.sequence_id,
        first_index=min(first_index, len(lease.blocks)),
        block_ids=tuple(lease.blocks[first_index:]),
        final=first_token is not None,
        first_token=first_token.token if first_token else 0,
        ended=first_token.ended if first_token else False,
    )
