"""One HTTP connection: uvicorn's, with bounds on what a client may send and how long it may take.

    idle -> head -> body -> response -> idle        each wait for the client ends:
     75 s   head_timeout_s  |  the request's own
                 upload_timeout_s (http_body.py)

Of connections a server keeps a bounded number. One beyond it is taken all the same: left in the
listener's queue it would wait without a word, and its client would not try another router. It asks
once, and is told that the router is full, unless it asks what must be known of a full router too: a
busy one that seems dead is restarted, with all it serves.

A head is bounded in bytes, as the parser joins the pieces of a header anew with each that comes.
While a response runs the connection is read on, as its end would not be seen otherwise; what comes
is kept for later, and not parsed before the response is complete.
"""

import asyncio
import http
import logging
from typing import Literal, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from core import telemetry
from core.errors import BatonError, InvalidRequest
from router.http_errors import (
    HeadTooLarge,
    HeadTooSlow,
    TooManyConnections,
    error_body,
    error_headers,
)
from router.http_line import ChunkedLine, PlainLine
from router.http_reply import ABORT_EXTENSION, LINE_EXTENSION

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that they close them and no request is lost."""
MAX_HEAD_BYTES = 64 * 1024
MAX_AHEAD_BYTES = 64 * 1024
"""Of further requests, kept while a response runs; when there is more the connection is not read
on, so its end is not seen."""
MAX_PIPELINED = 256
"""Requests that came in one piece; a client that sends more of them is dropped."""
ANSWERED_WHEN_FULL = (b"/health", b"/metrics", b"/control/workers")
"""The paths that connections beyond the bound may ask for. Not /ready: a full router is not."""
MAX_BEYOND = 256
"""Connections beyond the bound, there to ask once; with a further one the oldest is dropped."""
_LINGER_S = 2.0
"""To close at once would reset the connection, and a client still sending not see its answer. As
long may one beyond the bound take to ask."""
_UNREAD_S = 30.0
"""For what remains of a body after its response, and for a client to take what it was sent before
the connection closed."""


class ConnectionBound:
    """How many connections a server keeps; shared by all of them."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.beyond: dict[HttpConnection, None] = {}
        """Those open now that are beyond it, the oldest first."""
        self.turned_away = 0
        """Since the start."""


class HttpConnection(HttpToolsProtocol):
    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, object],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        bound: ConnectionBound,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._bound = bound

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.attended: set[ChunkedLine] = set()
        self._ahead = bytearray()
        self._part: Literal["idle", "head", "body"] = "idle"
        """Of a request, what is being received."""
        self._bare_bytes = 0
        """Since something of a body came, or the end of a message: a head, or a body's trailers."""
        self._since_s = self.loop.time()
        """When the present wait for the client began, where this class bounds it."""
        self._failure: BatonError | None = None
        """What a callback of the parser found, which only knows that one failed."""
        self._refused = False
        bound = self._bound
        if len(self.connections) - len(bound.beyond) > bound.most:
            bound.beyond[self] = None
            if len(bound.beyond) > MAX_BEYOND:
                next(iter(bound.beyond)).drop()

    def drop(self) -> None:
        """To make room for another one beyond the bound."""
        self._bound.beyond.pop(self, None)
        self._bound.turned_away += not self._refused
        self._refused = True
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._bound.beyond.pop(self, None)
        self._ahead.clear()
        for line in tuple(self.attended):
            line.lost()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._is_answering():
            self._ahead += data
            if len(self._ahead) > MAX_AHEAD_BYTES:
                self.flow.pause_reading()
            return
        if self._part == "idle":
            self._begin_head()
        self._bare_bytes += len(data)
        self._parse(data)
        if self._bare_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())

    def expire(self, now_s: float, head_timeout_s: float) -> None:
        """Give up a client that keeps the connection waiting for too long. Called now and then."""
        waited_s = now_s - self._since_s
        if self.transport.is_closing():
            if waited_s > _UNREAD_S:
                self.transport.abort()
        elif self._refused:
            if waited_s > _LINGER_S:
                self.transport.abort()
        elif self._is_beyond() and not self._is_running():
            if waited_s > _LINGER_S:
                self._refuse(self._full())
        elif self._is_running():
            # What it waits for is bounded by the request; closing begins after it.
            self._since_s = now_s
        elif self._part == "body":
            if waited_s > _UNREAD_S:
                self.transport.abort()
        elif self._part == "head":
            if waited_s > head_timeout_s:
                self._refuse(HeadTooSlow(f"the head did not come within {head_timeout_s:g} s"))
        elif waited_s > KEEP_ALIVE_S:
            self._since_s = now_s
            self.transport.close()

    # -- the parser's callbacks ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._part == "idle":  # behind another message in one piece
            self._begin_head()

    def on_headers_complete(self) -> None:
        head_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if head_bytes > MAX_HEAD_BYTES:
            self._failure = _too_large()
            raise self._failure
        beyond = self._is_beyond()
        if beyond and self.url.partition(b"?")[0] not in ANSWERED_WHEN_FULL:
            self._failure = self._full()
            raise self._failure
        self._part = "body"
        line = (PlainLine if self.parser.get_http_version() == "1.0" else ChunkedLine)(self)
        self.scope["extensions"] = {
            ABORT_EXTENSION: {"abort": self.transport.abort},
            LINE_EXTENSION: {"line": line},
        }
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self._failure = InvalidRequest("too many requests in one piece")
            raise self._failure
        if beyond:
            self.cycle.keep_alive = False
        if self.cycle.scope is self.scope:
            # The cycle's task has not begun: all that it writes passes the line.
            self.cycle.transport = cast(asyncio.Transport, line)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._bare_bytes = 0

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._part, self._bare_bytes = "idle", 0

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._since_s = self.loop.time()
        if self._ahead:
            self.loop.call_soon(self._resume)

    # -- below -----------------------------------------------------------------------------------

    def _parse(self, data: bytes) -> None:
        """In uvicorn's place: its log lines do not say whose connection it is."""
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:  # at what the client sent, or in a callback above
            self._refuse(self._failure or InvalidRequest("this is no HTTP request"))
        except httptools.HttpParserUpgrade:
            pass  # no other protocol is offered: the request is answered as it stands

    def _is_beyond(self) -> bool:
        return self in self._bound.beyond

    def _full(self) -> TooManyConnections:
        return TooManyConnections(f"the router keeps {self._bound.most} connections at most")

    def _is_running(self) -> bool:
        """A response is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def _is_answering(self) -> bool:
        """A response is not complete whose request is; or what came meanwhile is yet to be read."""
        cycle = self.cycle
        return bool(self._ahead or self.pipeline) or (
            cycle is not None and not cycle.response_complete and not cycle.more_body
        )

    def _resume(self) -> None:
        data, self._ahead = bytes(self._ahead), bytearray()
        if data and not self.transport.is_closing():
            self.data_received(data)

    def _begin_head(self) -> None:
        self._part = "head"
        self._since_s = self.loop.time()

    def _refuse(self, error: BatonError) -> None:
        """Answer what is no request, and close. Beside a request only the end can be told."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        if isinstance(error, TooManyConnections):
            self._bound.turned_away += 1  # which serve.py tells now and then
        else:
            client = None if self.client is None else f"{self.client[0]}:{self.client[1]}"
            said = {"client": client, "error": error.code, "message": error.message}
            log.info(telemetry.log_line("connection_refused", **said))
        self._unset_keepalive_if_required()
        self._since_s = self.loop.time()
        running = self._is_running()
        answered = self.cycle.response_started if running else self._part == "body"
        if self.pipeline or answered:
            self.transport.abort()
            return
        body, status = error_body(error), http.HTTPStatus(error.http_status)
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        more = b"".join(b"%b: %b\r\n" % header for header in error_headers(error))
        self.transport.write(head.encode() + more + b"\r\n" + body)
        if running:  # it would write behind an end, but not to what closes
            self.transport.close()
        else:
            self.transport.write_eof()


def _too_large() -> HeadTooLarge:
    return HeadTooLarge(f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes")
