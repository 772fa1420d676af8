"""The event core: a heap of things to happen, and the clock that jumps from one to the next."""

import heapq
from collections.abc import Callable
from math import inf
from typing import Any, TypeVar

A = TypeVar("A")


class Events:
    """Implements core.clock.Clock. Events of one time happen in the order they were asked for."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[Any], None], object]] = []
        self._asked = 0
        self.happened = 0

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s

    def at(self, when_s: float, call: Callable[[A], None], argument: A) -> None:
        """`call(argument)` when the clock is there; now, if that has passed."""
        self._asked += 1
        now_s = self._now_s
        due_s = when_s if when_s > now_s else now_s
        heapq.heappush(self._heap, (due_s, self._asked, call, argument))

    def run(self, until_s: float = inf) -> None:
        """Let happen whatever is due by then; the clock stays at the last of it."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_s:
            self._now_s, _, call, argument = pop(heap)
            self.happened += 1
            call(argument)

    def run_some(self, count: int) -> None:
        """The next `count` of them, or all there are."""
        heap, pop = self._heap, heapq.heappop
        for _ in range(min(count, len(heap))):
            self._now_s, _, call, argument = pop(heap)
            self.happened += 1
            call(argument)

    @property
    def pending(self) -> int:
        """Events still to come."""
        return len(self._heap)
