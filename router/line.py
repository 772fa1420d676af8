"""Those who wait for a place: first whoever can still be in time, then whoever cannot
(admission.is_late), each in order of coming. The live router and the simulator keep theirs in it.
"""

from collections import deque
from collections.abc import Iterator
from itertools import chain, takewhile
from typing import Generic, TypeVar

T = TypeVar("T")


class Line(Generic[T]):
    """Items are told apart by identity."""

    def __init__(self) -> None:
        self._parts = (deque[T](), deque[T]())
        """In time, late."""

    def __len__(self) -> int:
        return len(self._parts[0]) + len(self._parts[1])

    def __iter__(self) -> Iterator[T]:
        return chain(*self._parts)

    def append(self, item: T, *, late: bool) -> None:
        """Behind all of its part."""
        self._parts[late].append(item)

    def appendleft(self, item: T) -> None:
        """Before everybody."""
        self._parts[0].appendleft(item)

    def remove(self, item: T) -> None:
        """Raises ValueError if it is not there."""
        for part in self._parts:
            for i, other in enumerate(part):
                if other is item:
                    del part[i]
                    return
        raise ValueError("it is not in this line")

    def move(self, item: T, *, late: bool) -> bool:
        """From the other part to the end of that one; False if it does not stand in the other."""
        other = self._parts[not late]
        for i, one in enumerate(other):
            if one is item:
                del other[i]
                self.append(item, late=late)
                return True
        return False

    @property
    def next(self) -> T | None:
        """Whoever is to look first when there may be a place."""
        return next(iter(self), None)

    def ahead_of(self, item: T | None, *, late: bool) -> list[T]:
        """Who goes before it; None is one that comes now."""
        parts = self._parts if late else self._parts[:1]
        return list(takewhile(lambda other: other is not item, chain(*parts)))
