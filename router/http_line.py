"""How the answer to one request is written to its connection, past uvicorn's own `send`."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from uvicorn.protocols.http.flow_control import FlowControl


class Attendable(Protocol):
    """The connection, as a line sees it."""

    transport: asyncio.Transport
    flow: FlowControl
    loop: asyncio.AbstractEventLoop
    attended: "set[ChunkedLine]"


class ChunkedLine:
    """Implements router.http_reply.Line: writes HTTP/1.1 chunks past uvicorn's own `send`.

    uvicorn has sent a head without a length, which makes it chunked, and ends the body itself. It
    takes this for the transport: a head is held until what follows it, or until the loop's next
    turn, as two writes cost the router and the client twice.
    """

    __slots__ = ("_flow", "_head", "_headed", "_loop", "_lost", "_protocol", "_transport")

    def __init__(self, protocol: Attendable) -> None:
        self._protocol = protocol
        self._transport = protocol.transport
        self._flow = protocol.flow
        self._loop = protocol.loop
        self._head = b""
        self._headed = False
        self._lost: Callable[[], None] | None = None

    @property
    def paused(self) -> bool:
        return self._flow.write_paused

    def put(self, chunk: bytes) -> None:
        data = b"%x\r\n%b\r\n" % (len(chunk), chunk)
        if self._head:
            self._write(data)
        elif not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        await self._flow.drain()

    def attend(self, lost: Callable[[], None] | None) -> None:
        self._lost = lost
        if lost is None:
            self._protocol.attended.discard(self)
        else:
            self._protocol.attended.add(self)
            self._flow.resume_reading()  # a connection that is not read is not seen to end

    def lost(self) -> None:
        """The connection has ended."""
        if self._lost is not None:
            self._lost()

    # -- what uvicorn does with a transport ------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._headed:
            self._write(data)
        else:
            self._headed, self._head = True, data
            self._loop.call_soon(self._write, b"")

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._write(b"")
        self._transport.close()

    def _write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
        if data and not self._transport.is_closing():
            self._transport.write(data)


class PlainLine(ChunkedLine):
    """For HTTP/1.0, which knows no chunks: a body ends with the connection.

    uvicorn frames all that it writes behind a head without a length, one chunk at a time.
    """

    __slots__ = ("_framed",)
    _CHUNKED = b"transfer-encoding: chunked\r\n"

    def put(self, chunk: bytes) -> None:
        self._write(chunk)

    def write(self, data: bytes) -> None:
        if not self._headed:
            self._framed = self._CHUNKED in data
            super().write(data.replace(self._CHUNKED, b"", 1))
        elif self._framed:
            size, _, rest = data.partition(b"\r\n")
            super().write(rest[: int(size, 16)])
        else:
            super().write(data)
