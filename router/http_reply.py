"""One HTTP response: what was already sent, and the two ways to send: a JSON body or SSE."""

from collections.abc import Callable
from typing import Protocol

from starlette.types import Scope, Send

from core.errors import BatonError, InternalError
from router.http_errors import Header, error_body, error_headers

ABORT_EXTENSION = "baton.abort"
"""ASGI extension of our server: `scope["extensions"][ABORT_EXTENSION]["abort"]()` drops the
connection without waiting for what is unsent. The app then waits for `http.disconnect`, or the
server takes its response for incomplete.
"""


LINE_EXTENSION = "baton.line"
"""ASGI extension of our server: `scope["extensions"][LINE_EXTENSION]["line"]` is the Line of the
request's connection, for chunks of a body whose head was sent.
"""


class Line(Protocol):
    """A connection that takes chunks without a coroutine per chunk; the server's side of a stream.

    `put` never waits and never raises: while `paused`, or once the client has gone, it is for the
    caller not to pile up more. `drain` returns when the connection is not paused. `attend` has
    `lost` called once the connection has ended, until another call withdraws it.
    """

    @property
    def paused(self) -> bool: ...

    def put(self, chunk: bytes) -> None: ...

    async def drain(self) -> None: ...

    def attend(self, lost: Callable[[], None] | None) -> None: ...


def line_of(scope: Scope) -> Line:
    """Of this request's connection."""
    line: Line = scope["extensions"][LINE_EXTENSION]["line"]
    return line


class Reply:
    """Wraps ASGI's `send` for one request."""

    __slots__ = ("_scope", "_send", "started")

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self.started = False

    async def json(self, status: int, body: bytes, headers: list[Header] | None = None) -> None:
        """The whole response."""
        content = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *(headers or []),
        ]
        await self._start(status, content)
        await self.end(body)

    async def error(self, error: BatonError) -> None:
        """The whole response, in OpenAI's error shape."""
        await self.json(error.http_status, error_body(error), error_headers(error))

    async def start_stream(self) -> Line:
        """Status 200 and the head of an event stream; its events go to the line."""
        await self._start(
            200,
            [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                # Buffering proxies (nginx) would hold tokens back.
                (b"x-accel-buffering", b"no"),
            ],
        )
        return line_of(self._scope)

    def start_stream_now(self) -> Line:
        """As `start_stream`, while the connection is not paused: nothing is waited for then, so a
        first token that comes from a worker's stream wakes no task.
        """
        starting = self.start_stream()
        try:
            starting.send(None)
        except StopIteration as started:
            line: Line = started.value
            return line
        starting.close()
        raise InternalError("the server made the head of a response wait")

    @property
    def paused(self) -> bool:
        """What is sent now waits for the client."""
        return line_of(self._scope).paused

    async def end(self, chunk: bytes) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    def abort(self) -> None:
        """Drop the connection with what is unsent, where the server can."""
        extension = self._scope.get("extensions", {}).get(ABORT_EXTENSION)
        if extension is not None:
            extension["abort"]()

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
