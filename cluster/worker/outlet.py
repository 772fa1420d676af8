"""What one router is told: messages at once, tokens as one frame per step, changes of load."""

from collections.abc import Callable

from core.messages import (
    HEARTBEAT_S,
    KvEvents,
    KvSnapshot,
    LegTokens,
    LoadReport,
    TokenFrame,
    WorkerToRouter,
)


class RouterOutlet:
    """One router's stream, as seen from inside the worker (core.sink.RouterSink)."""

    def __init__(self, say: Callable[[WorkerToRouter], None]) -> None:
        """`say` puts a message on its way and never waits."""
        self._say = say
        self.last_submit = 0
        self._next_number = 0
        self._frame: list[LegTokens] = []
        self._load: LoadReport | None = None
        self._reported_at_s = 0.0

    def is_new(self, number: int) -> bool:
        """Take note of a submit; False when its number does not count up."""
        new = number >= self._next_number
        if new:
            self._next_number, self.last_submit = number + 1, number
        return new

    def send(self, message: WorkerToRouter) -> None:
        """Say a message behind the tokens gathered so far, which keep their order."""
        if self._frame and not isinstance(message, LoadReport | KvEvents | KvSnapshot):
            self.flush()
        self._say(message)

    def tokens(self, entry: LegTokens) -> None:
        self._frame.append(entry)

    def flush(self) -> None:
        """End of a step: the gathered tokens leave as one frame."""
        if self._frame:
            entries, self._frame = tuple(self._frame), []
            self._say(TokenFrame(entries=entries))  # which may end legs, and say so through here

    def report(self, load: LoadReport, now_s: float) -> None:
        """Send the load if it differs from what this router heard last, or as a heartbeat."""
        if load != self._load or now_s - self._reported_at_s >= HEARTBEAT_S:
            self._load, self._reported_at_s = load, now_s
            self._say(load)
