"""Runs the HTTP application in the event loop it is called from: uvicorn, without its signals.

listener = bind_listener(host, port)      # first of all: a taken port fails here
port = listener.getsockname()[1]
await serve(app, listener, stop=event)    # until `stop` is set
"""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from core.errors import ConfigError
from router.http_reply import ABORT_EXTENSION, LINE_EXTENSION

BACKLOG = 2048
SEND_BUFFER_BYTES = 256 * 1024
"""Of each connection. The kernel's own limit is megabytes: a client that stopped reading would be
tens of thousands of tokens behind before the stream's bound saw it.
"""
KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that they close them and no request is lost."""
_LEFTOVER_S = 5.0


def bind_listener(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises ConfigError if it cannot be had."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"router host '{host}' is not an address: {error.strerror}") from error
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit both from the listener.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind(address)
        # Listening at once: two sockets may bind one port as long as neither listens.
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is in use; choose another") from error
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


async def serve(
    app: ASGIApp, listener: socket.socket, *, stop: asyncio.Event, grace_s: float = 30.0
) -> None:
    """Serve until `stop` is set; then no new connection, and running requests have `grace_s`.

    What runs longer is cancelled and answers with an error. Closes `listener`. When cancelled
    itself it grants no grace.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    server = _Server(config)
    try:
        async with asyncio.TaskGroup() as group:
            waiter = group.create_task(_request_exit(server, stop))
            await server.serve(sockets=[listener])
            waiter.cancel()
    finally:
        await _clear(server)
        listener.close()


async def _request_exit(server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


async def _clear(server: uvicorn.Server) -> None:
    """uvicorn does not wait for what it cancels, and cleans nothing up when cancelled itself."""
    if server.started:
        for accepting in server.servers:
            accepting.close()
    state = server.server_state
    for task in list(state.tasks):
        task.cancel()
    if state.tasks:
        await asyncio.wait(list(state.tasks), timeout=_LEFTOVER_S)
    for connection in list(state.connections):
        if isinstance(connection, HttpToolsProtocol):
            connection.transport.abort()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process that embeds this server."""
        yield


class _Protocol(HttpToolsProtocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.attended: set[_Line] = set()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for line in tuple(self.attended):
            line.lost()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {
            ABORT_EXTENSION: {"abort": self.transport.abort},
            LINE_EXTENSION: {"line": _Line(self)},
        }

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle.scope is self.scope:
            # The cycle's task has not begun: all that it writes passes the line.
            line = self.scope["extensions"][LINE_EXTENSION]["line"]
            self.cycle.transport = cast(asyncio.Transport, line)


class _Line:
    """Implements router.http_reply.Line: writes HTTP/1.1 chunks past uvicorn's own `send`.

    uvicorn has sent a head without a length, which makes it chunked, and ends the body itself. It
    takes this for the transport: a head is held until what follows it, or until the loop's next
    turn, as two writes cost the router and the client twice.
    """

    __slots__ = ("_flow", "_head", "_headed", "_loop", "_lost", "_protocol", "_transport")

    def __init__(self, protocol: _Protocol) -> None:
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
