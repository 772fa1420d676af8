"""A bounded queue between code that must not wait and the one writer of a stream."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Outbox(Generic[T]):
    """`send` never waits. When the writer falls behind by `limit` items the outbox overflows: it
    closes, and its owner, who waits for `overflowed` beside the writer, ends the stream, because a
    peer that misses messages is a lost peer.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._wake = asyncio.Event()
        self._closed = False
        self.overflowed = asyncio.Event()

    def send(self, item: T) -> None:
        """Queue an item; dropped when the outbox is closed."""
        if self._closed:
            return
        if len(self._items) >= self._limit:
            self.overflowed.set()
            self.close()
            return
        self._items.append(item)
        self._wake.set()

    def close(self) -> None:
        """No more items are taken; those queued are still handed out, unless it overflowed."""
        self._closed = True
        if self.overflowed.is_set():
            self._items.clear()
        self._wake.set()

    def __aiter__(self) -> "Outbox[T]":
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._items.popleft()
