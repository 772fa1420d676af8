"""The faults one worker process has been told to have, and the gates it stands at."""

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from contextvars import ContextVar

from core.ids import LeaseId
from tests.faults.fault import Fault

_GATE_S = 30.0

PULL: ContextVar[set[Fault]] = ContextVar("PULL")
"""Inside a pull: the faults of its reads so far, of which each happens once in a pull."""


class Board:
    """Commands come on the event loop; faults happen there and on the engine's thread."""

    def __init__(self, on_hit: Callable[[Fault], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_hit = on_hit
        self._lock = threading.Lock()
        self._armed: Counter[Fault] = Counter()
        self._each: dict[Fault, int | None] = {}
        self._of: defaultdict[Fault, Counter[LeaseId]] = defaultdict(Counter)
        self._held: defaultdict[Fault, list[Callable[[], None]]] = defaultdict(list)
        self._news = asyncio.Event()

    def arm(self, fault: Fault, times: int, each: int | None = None) -> None:
        """It happens the next `times` times that it can, but to no lease more than `each` times."""
        with self._lock:
            self._armed[fault] = times
            self._each[fault] = each
            self._of[fault].clear()
        self._news.set()

    async def comes(self, fault: Fault) -> None:
        """Wait until it is armed; it has happened then."""
        while not self.take(fault):
            self._news.clear()
            await self._news.wait()

    def armed(self, fault: Fault) -> bool:
        """Whether it would happen now."""
        return self._armed[fault] > 0 and fault not in PULL.get(set())

    def go(self, fault: Fault) -> None:
        """Open the gate for all who stand at it now."""
        with self._lock:
            openers, self._held[fault] = self._held[fault], []
        for opener in openers:
            opener()

    def take(self, fault: Fault, of: LeaseId | None = None) -> bool:
        """Whether it happens now, to this lease; the test is told."""
        with self._lock:
            each = self._each.get(fault)
            if each is not None and of is not None and self._of[fault][of] >= each:
                return False
        if not self._take(fault, None):
            return False
        if of is not None:
            self._of[fault][of] += 1
        return True

    async def hold(self, fault: Fault) -> None:
        """Stand at the gate if it is armed, until `go`."""
        opened = asyncio.Event()
        if self._take(fault, opened.set):
            async with asyncio.timeout(_GATE_S):
                await opened.wait()

    def hold_thread(self, fault: Fault) -> None:
        """As `hold`, from another thread than the event loop's."""
        opened = threading.Event()
        if self._take(fault, opened.set):
            opened.wait(_GATE_S)

    def _take(self, fault: Fault, opener: Callable[[], None] | None) -> bool:
        had = PULL.get(set())
        with self._lock:
            if self._armed[fault] <= 0 or fault in had:
                return False
            self._armed[fault] -= 1
            if opener is not None:
                self._held[fault].append(opener)
        had.add(fault)
        self._loop.call_soon_threadsafe(self._on_hit, fault)
        return True
