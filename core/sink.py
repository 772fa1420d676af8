"""Where a worker's roles put what one router shall hear."""

from typing import Protocol

from core.messages import LegTokens, WorkerToRouter


class RouterSink(Protocol):
    """One router's stream as the roles see it. Neither call waits; both do nothing once it is lost.

    `tokens` are gathered and leave as one frame at the end of the engine step.
    """

    def send(self, message: WorkerToRouter) -> None: ...

    def tokens(self, entry: LegTokens) -> None: ...
