"""The closing question of one hand-off, asked by whoever sees its last read end.

Mostly that is the thread on which the read ran: it sends the question itself, and the event loop
hears of the end meanwhile. Where it cannot (something else is unsent, another transport, checksums
to compare) the event loop asks, as it does when an answer is late.
"""

import threading

from core.stream import ThreadDoor


class ClosingQuestion:
    """Asked at most once from here, and only while no read is under way.

    begun and armed and claimed and withdrawn on the event loop, `read_ended` on any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._door: ThreadDoor | None = None
        self._frame = b""
        self._reads = 0
        self._armed = False
        self._over = False
        self.asked = False
        """From now on a HELD may be under way."""

    def prepare(self, door: ThreadDoor, frame: bytes) -> None:
        """What to send, and where."""
        self._door, self._frame = door, frame

    def read_begun(self) -> None:
        """Before the transport is asked."""
        with self._lock:
            self._reads += 1

    def arm(self) -> None:
        """No further read will be begun."""
        self._armed = True

    def read_ended(self) -> None:
        """A read has ended well: no more bytes of it can arrive."""
        with self._lock:
            self._reads -= 1
            if self._reads or not self._armed or self._over or self._door is None:
                return
            self._over = self.asked = True  # before: its answer may be heard before `send` returns
            if not self._door.send(self._frame):
                self._over = self.asked = False

    def claim(self) -> bool:
        """Whether the event loop is to ask, all reads having ended well."""
        with self._lock:
            if self._over:
                return False
            self._over = self.asked = True
            return True

    def withdraw(self) -> bool:
        """From now on nobody asks; whether somebody has."""
        with self._lock:
            self._over = True
            return self.asked
