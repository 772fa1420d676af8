"""Request bodies, in bounds: each in bytes and time, and all that are here at once in bytes.

`Intake.body` is the one way to a body, for the generating endpoints and, through `BodyLimit`, for
all others. It counts until the caller is done with the body, so until it is parsed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import BatonError, InvalidRequest, Overloaded, RequestTooLarge
from core.json_body import shortened
from router.config import RouterConfig
from router.http_errors import BodyTooSlow, ClientGone
from router.http_reply import Reply
from router.request_context import header

FREE_BYTES = 64 * 1024
"""Of each body, not counted: large ones that come slowly leave room for small ones."""
INLINE_BYTES = 64 * 1024
"""A body up to here is parsed on the event loop, within a millisecond or two."""

T = TypeVar("T")


class Intake:
    """All bodies of one router."""

    def __init__(self, settings: RouterConfig) -> None:
        self._max_bytes = settings.max_body_bytes
        self._max_held_bytes = settings.max_bodies_mb * 1024 * 1024
        self._timeout_s = settings.upload_timeout_s
        self._held_bytes = 0

    @contextlib.asynccontextmanager
    async def body(self, scope: Scope, receive: Receive) -> AsyncIterator[bytearray]:
        """The whole body, inside the block only. Raises RequestTooLarge as soon as that is known,
        leaving the rest unread, BodyTooSlow, InvalidRequest, Overloaded, ClientGone.
        """
        _check_head(scope, self._max_bytes)
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._fill(body, receive)
            except TimeoutError:
                raise BodyTooSlow(f"the body did not come within {self._timeout_s:g} s") from None
            yield body
        finally:
            self._held_bytes -= _counted(len(body))
            body.clear()  # an error's traceback may hold it until the next full collection

    async def _fill(self, body: bytearray, receive: Receive) -> None:
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("the client closed the connection")
            piece, more = message.get("body", b""), message.get("more_body", False)
            if len(body) + len(piece) > self._max_bytes:
                raise _too_large(self._max_bytes)
            self._count(len(body), len(piece))
            body += piece

    def _count(self, present: int, coming: int) -> None:
        counted = _counted(present)
        further = _counted(present + coming) - counted
        others = self._held_bytes - counted
        if further and others and self._held_bytes + further > self._max_held_bytes:
            raise Overloaded("too many large bodies are being received; try again later")
        self._held_bytes += further


def _counted(num_bytes: int) -> int:
    return max(0, num_bytes - FREE_BYTES)


def _check_head(scope: Scope, max_bytes: int) -> None:
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and (len(length) > 18 or int(length) > max_bytes):
        raise _too_large(max_bytes)
    encoding = header(scope, b"content-encoding")
    if encoding is not None and encoding.lower() not in ("", "identity"):
        raise InvalidRequest(
            f"a body with Content-Encoding '{shortened(encoding)}' is not read; send it as it is"
        )


def _too_large(max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body is larger than {max_bytes} bytes")


async def parsed(parse: Callable[[bytes | bytearray], T], body: bytes | bytearray) -> T:
    """What `parse` makes of the body; large ones are parsed off the event loop."""
    if not body:
        raise InvalidRequest("the body is empty; send a JSON object")
    if len(body) <= INLINE_BYTES:
        return parse(body)
    return await asyncio.to_thread(parse, body)


class BodyLimit:
    """ASGI middleware: the app inside is only called with a whole body."""

    def __init__(self, app: ASGIApp, intake: Intake) -> None:
        self._app = app
        self._intake = intake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        async with contextlib.AsyncExitStack() as stack:
            try:
                body = await stack.enter_async_context(self._intake.body(scope, receive))
            except ClientGone:
                return
            except BatonError as error:
                await Reply(scope, send).error(error)
                return
            unread: list[Message] = [
                {"type": "http.request", "body": bytes(body), "more_body": False}
            ]

            async def receive_whole() -> Message:
                return unread.pop() if unread else await receive()

            await self._app(scope, receive_whole, send)
