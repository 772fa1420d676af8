"""An owner that loses, doubles or delays what it says, and a reader that stops before it speaks.

The faults that take a protection away are for the controls: without it the row must fail.
"""

import os
from collections.abc import Callable
from dataclasses import replace

from core.ids import LeaseId
from kv_transfer.landing import Landing
from kv_transfer.leases import LeaseTable
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    FromOwner,
    FromReader,
    LeaseOutcome,
    PeerHello,
    Renew,
    Renewed,
)
from kv_transfer.owner import Owner, Send
from kv_transfer.reader import Pulled, PullRequest, Reader
from tests.faults.board import PULL, Board
from tests.faults.fault import Fault

_LEAK_BYTES = 1024 * 1024


class FaultyOwner(Owner):
    """Its faults are on the way in and out; what it decides is the real owner's."""

    def __init__(self, board: Board, table: LeaseTable, on_freed: Callable[[], None]) -> None:
        super().__init__(table, on_freed)
        self._board = board
        self._late: dict[LeaseId, Announce] = {}

    def attach(self, hello: PeerHello, send: Send) -> str:
        return super().attach(hello, lambda message: self._say(send, message))

    def handle(self, reader: str, message: FromReader) -> None:
        board = self._board
        match message:
            case _ if board.take(Fault.STREAM_BROKEN):
                raise RuntimeError("injected by a test")
            case Close() if board.take(Fault.CLOSE_LOST, message.lease_id):
                return
            case Renew() if board.take(Fault.RENEWAL_WITHOUT_EFFECT):
                self._send(reader, Renewed())
            case Bind() if board.take(Fault.NO_FENCE):
                lease = self.table.get(message.lease_id)
                assert lease is not None
                lease.sequence_id = message.sequence_id
                super().handle(reader, message)
            case _:
                super().handle(reader, message)

    def detach(self, reader: str) -> None:
        if self._board.take(Fault.LEASES_OF_THE_LOST):
            del self._readers[reader]
        else:
            super().detach(reader)

    def sweep(self) -> None:
        if not self._board.take(Fault.NO_EXPIRY):
            super().sweep()

    def _say(self, send: Send, message: FromOwner) -> None:
        if self._board.take(Fault.OWNER_MUTE):
            return
        match message:
            case Announce():
                self._announce(send, message)
            case Closed() if self._board.take(Fault.CLOSED_LOST, message.lease_id):
                return
            case Closed() if self._board.take(Fault.ALWAYS_HELD):
                send(replace(message, outcome=LeaseOutcome.HELD))
            case Abort() if self._board.take(Fault.ABORT_LOST):
                return
            case _:
                send(message)

    def _announce(self, send: Send, announce: Announce) -> None:
        board, lease_id = self._board, announce.lease_id
        if board.take(Fault.ANNOUNCEMENT_LOST, lease_id):
            return
        if announce.final and board.take(Fault.LAST_ANNOUNCEMENT_LOST, lease_id):
            return
        if not announce.final and board.take(Fault.ANNOUNCEMENT_LATE, lease_id):
            self._late[lease_id] = announce
            return
        send(announce)
        if board.take(Fault.ANNOUNCEMENT_DOUBLED, lease_id):
            send(replace(announce))
        late = self._late.pop(lease_id, None)
        if late is not None:
            send(late)


class FaultyReader(Reader):
    """Stands still before a pull; may lack what keeps a late write from doing harm."""

    def __init__(self, board: Board, **parts: object) -> None:
        super().__init__(**parts)  # type: ignore[arg-type]
        self._board = board
        self._leaked: list[tuple[bytearray, int]] = []

    async def pull(self, request: PullRequest) -> Pulled:
        PULL.set(set())
        await self._board.hold(Fault.BEFORE_BIND)
        if self._board.take(Fault.LEAK):
            memory = bytearray(os.urandom(_LEAK_BYTES))
            self._leaked.append((memory, os.open(os.devnull, os.O_RDONLY)))
        return await super().pull(request)

    def give_back(self, landing: Landing) -> None:
        running = any(not read.done() for read in landing.reads)
        if running and self._board.take(Fault.NO_QUARANTINE):
            self.pool.release(landing.cached)
            self.pool.abandon(landing.fresh)
            self.space_freed()
        else:
            super().give_back(landing)
