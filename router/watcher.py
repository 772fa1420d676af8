"""What the flow decides beside placement, for whoever counts it."""

from enum import StrEnum
from typing import Protocol

from router.local import LocalVerdict


class RejectReason(StrEnum):
    """Why a request was refused; the label of its counter."""

    TARGET = "target"
    """Its TTFT target cannot be met any more."""
    DECODE = "decode"
    """No decode worker could keep its TPOT target, or has the memory."""
    QUEUE_FULL = "queue_full"


class EjectReason(StrEnum):
    """Why a worker is left out of placement; the label of its counter."""

    FAILURES = "failures"
    SLOW = "slow"
    HUNG = "hung"
    """Its engine is in a step that does not end: until it does."""


class Requeue(StrEnum):
    """Steps of a queued prompt's move to another prefill worker; the label of its counter."""

    ASKED = "asked"
    MOVED = "moved"
    """It had not begun, and goes elsewhere."""


class FlowWatcher(Protocol):
    """Called on the event loop; must neither wait nor raise."""

    def admitted(self, waited_s: float) -> None:
        """A sequence was, so long after it had come."""
        ...

    def rejected(self, reason: RejectReason) -> None:
        """A sequence was, with 429."""
        ...

    def queued(self, requests: int) -> None:
        """So many wait for admission now."""
        ...

    def placed(self, verdict: LocalVerdict) -> None:
        """An admitted sequence is: on one worker alone, or on a pair."""
        ...

    def ejected(self, reason: EjectReason) -> None:
        """A worker was."""
        ...

    def readmitted(self) -> None:
        """An ejected worker was, after a probe."""
        ...

    def requeued(self, step: Requeue) -> None:
        """A queued prompt is asked to move, or moves."""
        ...


class Unwatched:
    """A FlowWatcher for those who count nothing."""

    def admitted(self, waited_s: float) -> None:
        pass

    def rejected(self, reason: RejectReason) -> None:
        pass

    def queued(self, requests: int) -> None:
        pass

    def placed(self, verdict: LocalVerdict) -> None:
        pass

    def ejected(self, reason: EjectReason) -> None:
        pass

    def readmitted(self) -> None:
        pass

    def requeued(self, step: Requeue) -> None:
        pass
