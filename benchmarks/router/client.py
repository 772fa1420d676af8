"""Clients of the router's HTTP port: one object per request, all in one event loop.

They read and count, and parse as little as they can, so that one core drives the router and the
workers. Their sockets acknowledge when the kernel likes (delayed ACKs), as a client's do; those of
a client with `quick_acks` do so at once, which shows what delayed ACKs cost.
"""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from benchmarks.types import BenchFailed

_EVENT = b"data: "
_END = b"0\r\n\r\n"


def chat_body(model: str, prompt: str, max_tokens: int) -> bytes:
    """A streaming chat request whose answer has exactly so many tokens."""
    return json.dumps(
        {
            "model": model,
            "stream": True,
            "ignore_eos": True,
            "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": prompt}],
        }
    ).encode()


@dataclass(slots=True)
class Seen:
    """What a client saw of its answer; times by CLOCK_MONOTONIC, in seconds.

    `events` are SSE events without the closing [DONE]; `reads` the pieces they came in; `gaps_s`
    the times between pieces, from the response's head on.
    """

    asked_at_s: float = 0.0
    first_at_s: float = 0.0
    ended_at_s: float = 0.0
    events: int = 0
    reads: int = 0
    nbytes: int = 0
    gaps_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.first_at_s - self.asked_at_s


class Client(asyncio.Protocol):
    """A keep-alive connection with at most one request in flight."""

    def __init__(self, *, quick_acks: bool = False) -> None:
        self.seen = Seen()
        self._quick_acks = quick_acks
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[Seen] | None = None
        self._last_s = 0.0
        self._tail = b""
        self._body = False

    @classmethod
    async def connect(cls, port: int, *, quick_acks: bool = False) -> "Client":
        loop = asyncio.get_running_loop()
        make = partial(cls, quick_acks=quick_acks)
        _, client = await loop.create_connection(make, "127.0.0.1", port)
        return client

    def ask(self, body: bytes) -> "asyncio.Future[Seen]":
        """Send a request; the future has what was seen once the answer is complete."""
        if self._transport is None:
            raise BenchFailed("the router closed a connection")
        self.seen = Seen(asked_at_s=time.monotonic())
        self._last_s, self._tail, self._body = 0.0, b"", False
        self._done = asyncio.get_running_loop().create_future()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        return self._done

    @property
    def alive(self) -> bool:
        """The connection is open and, while an answer is awaited, it is still awaited."""
        return self._transport is not None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by type

    def data_received(self, data: bytes) -> None:
        now_s, seen = time.monotonic(), self.seen
        if self._quick_acks and self._transport is not None:
            wire = self._transport.get_extra_info("socket")  # the kernel forgets it now and then
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if not self._body:
            data = self._head(self._tail + data, now_s)
            if not data:
                return
        # A mark may be cut in two: its beginning is looked at again, but holds no whole one.
        text = self._tail + data
        events = text.count(_EVENT)
        self._tail = text[1 - len(_EVENT) :]
        seen.events += events
        if events:
            seen.first_at_s = seen.first_at_s or now_s
            seen.gaps_s.append(now_s - self._last_s)
            self._last_s = now_s
        seen.reads += 1
        seen.nbytes += len(data)
        if text.endswith(_END) and self._done is not None:
            seen.ended_at_s = now_s
            seen.events -= 1  # [DONE]
            if not self._done.done():
                self._done.set_result(seen)
            self._done = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(f"the router dropped an answer: {exc or 'it closed the connection'}")

    def _fail(self, reason: str) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(BenchFailed(reason))
        self._done = None

    def _head(self, data: bytes, now_s: float) -> bytes:
        """What comes after the response's head; nothing while that is incomplete."""
        head, found, rest = data.partition(b"\r\n\r\n")
        if not found:
            self._tail = data
            return b""
        if not head.startswith(b"HTTP/1.1 200"):
            self._fail(f"the router answered {data[:300]!r}")
            self.close()
            return b""
        self._tail, self._body, self._last_s = b"", True, now_s
        return rest


async def closed_loop(
    port: int,
    bodies: Callable[[int], bytes],
    *,
    streams: int,
    seconds: float,
    quick_acks: bool = False,
) -> list[Seen]:
    """`streams` clients, each asking again as soon as it has its answer; answers that ended."""
    ends_s = time.monotonic() + seconds
    answers: list[Seen] = []
    asked = iter(range(1_000_000_000))

    async def one() -> None:
        client = await Client.connect(port, quick_acks=quick_acks)
        try:
            while time.monotonic() < ends_s:
                answers.append(await client.ask(bodies(next(asked))))
        finally:
            client.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(one())
    return answers
