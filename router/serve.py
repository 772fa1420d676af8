"""Runs the HTTP application in the event loop it is called from: uvicorn, without its signals.

listener = bind_listener(host, port)      # first of all: a taken port fails here
port = listener.getsockname()[1]
await serve(app, listener, stop=event)    # until `stop` is set
"""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from core.errors import ConfigError
from router import descriptors
from router.http_connection import KEEP_ALIVE_S, ConnectionBound, HttpConnection

BACKLOG = 2048
SEND_BUFFER_BYTES = 256 * 1024
"""Of each connection. The kernel's own limit is megabytes: a client that stopped reading would be
tens of thousands of tokens behind before the stream's bound saw it.
"""
_LEFTOVER_S = 5.0
_EXPIRE_EVERY_S = 1.0
_LOOK_EVERY_S = 1.0
_WARN_EVERY_S = 30.0

log = logging.getLogger(__name__)


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
    app: ASGIApp,
    listener: socket.socket,
    *,
    stop: asyncio.Event,
    grace_s: float = 30.0,
    head_timeout_s: float = 15.0,
    max_connections: int = 16_384,
) -> None:
    """Serve until `stop` is set; then no new connection, and running requests have `grace_s`.

    What runs longer is cancelled and answers with an error. Closes `listener`. When cancelled
    itself it grants no grace. A client has `head_timeout_s` for the head of a request. One that
    finds `max_connections` open is answered 503, but for ANSWERED_WHEN_FULL.
    """
    bound = ConnectionBound(max_connections)
    config = uvicorn.Config(
        app,
        http=cast(type[asyncio.Protocol], partial(HttpConnection, bound=bound)),
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
            beside = (
                group.create_task(_request_exit(server, stop)),
                group.create_task(_expire(server, head_timeout_s)),
                group.create_task(_warn(bound)),
            )
            await server.serve(sockets=[listener])
            for task in beside:
                task.cancel()
    finally:
        await _clear(server)
        listener.close()


async def _request_exit(server: uvicorn.Server, stop: asyncio.Event) -> None:
    await stop.wait()
    server.should_exit = True


async def _expire(server: uvicorn.Server, head_timeout_s: float) -> None:
    """One look at all connections costs less than a timer for each of their requests."""
    while True:
        await asyncio.sleep(min(_EXPIRE_EVERY_S, head_timeout_s))
        now_s = asyncio.get_running_loop().time()
        for connection in _connections(server):
            connection.expire(now_s, head_timeout_s)


async def _warn(bound: ConnectionBound) -> None:
    """Of clients that are turned away, now and then. Where no file can be opened the loop drops
    them itself, without a word to anybody.
    """
    told = 0
    while True:
        if descriptors.are_exhausted():
            log.warning(
                "router_out_of_files: clients are dropped; raise the process's limit of open files"
                " (ulimit -n, LimitNOFILE), or lower router.max_connections"
            )
        elif bound.turned_away > told:
            log.warning(
                "router_connections_full most=%d turned_away=%d: add a router, or raise"
                " router.max_connections",
                *(bound.most, bound.turned_away - told),
            )
        else:
            await asyncio.sleep(_LOOK_EVERY_S)
            continue
        told = bound.turned_away
        await asyncio.sleep(_WARN_EVERY_S)


def _connections(server: uvicorn.Server) -> list[HttpConnection]:
    return [one for one in server.server_state.connections if isinstance(one, HttpConnection)]


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
    for connection in _connections(server):
        connection.transport.abort()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process that embeds this server."""
        yield
