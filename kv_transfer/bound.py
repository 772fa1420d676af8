"""A lease as its reader sees it."""

import asyncio
from collections import deque
from collections.abc import Callable

from core.errors import TransferFailed
from core.ids import LeaseId
from kv_transfer.messages import Announce, Closed, LeaseOutcome

_INBOX_MESSAGES = 65_536


class BoundLease:
    """What arrives for one lease: announcements, then its end. `changed` wakes the one pull.

    `on_announce` is called for each announcement as it is heard, before `changed`.
    """

    def __init__(self, lease_id: LeaseId) -> None:
        self.lease_id = lease_id
        self.inbox: deque[Announce] = deque()
        self.changed = asyncio.Event()
        self.on_announce: Callable[[], None] | None = None
        self.failure: TransferFailed | None = None
        self.asked = False
        """Whether it was: from then on a HELD may be under way."""
        self.closed: Closed | None = None
        self.answered = False
        """Whether the owner has; `closed` may be known without it."""

    def hear(self, announce: Announce) -> None:
        """More blocks are final."""
        if len(self.inbox) >= _INBOX_MESSAGES:
            self.failure = self.failure or TransferFailed("the pull fell behind its announcements")
            self.changed.set()
            return
        self.inbox.append(announce)
        if self.on_announce is not None:
            self.on_announce()
        self.changed.set()

    def answer(self, closed: Closed) -> None:
        """The closing question's; one that nobody asked for is none."""
        self.answered = self.answered or self.asked
        if self.asked and self.closed is None:
            self.closed = closed
            self.changed.set()

    def sealed(self) -> None:
        """Its seal was whole after the last read: that is the answer, before the owner's own."""
        if self.closed is None:
            self.closed = Closed(lease_id=self.lease_id, outcome=LeaseOutcome.HELD)
            self.changed.set()

    def fail(self, failure: TransferFailed) -> None:
        """Nothing more comes; the closing question stays unanswered."""
        self.failure = self.failure or failure
        self.answered = True  # by its end: there is nothing left to ask
        if self.closed is None:
            self.closed = Closed(lease_id=self.lease_id, outcome=LeaseOutcome.ABORTED)
        self.changed.set()

    def raise_failure(self) -> None:
        """Raise what ended the lease, if anything did."""
        if self.failure is not None:
            raise afresh(self.failure)


def afresh(failure: TransferFailed) -> TransferFailed:
    """The same without a traceback: one that is kept would keep the stream's socket open."""
    return TransferFailed(failure.message, cause=failure.cause)
