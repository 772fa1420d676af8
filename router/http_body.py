"""Request bodies, in bounds: for the generating endpoints, and for all others as a middleware."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import BatonError, DeadlineExceeded, RequestTooLarge
from router.http_errors import ClientGone
from router.http_reply import Reply
from router.request_context import header


async def read_body(scope: Scope, receive: Receive, max_bytes: int) -> bytearray:
    """Raises RequestTooLarge as soon as that is known, leaving the rest unread, and ClientGone."""
    too_large = RequestTooLarge(f"the body is larger than {max_bytes} bytes")
    length = header(scope, b"content-length")
    if length is not None and length.isdigit() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client closed the connection")
        body += message.get("body", b"")
        if len(body) > max_bytes:
            raise too_large
        if not message.get("more_body", False):
            return body


class BodyLimit:
    """ASGI middleware: the app inside is only called with a whole body of at most `max_bytes`,
    which came within `timeout_s`.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await read_body(scope, receive, self._max_bytes)
        except ClientGone:
            return
        except TimeoutError:
            await Reply(scope, send).error(DeadlineExceeded("the body did not come in time"))
            return
        except BatonError as error:
            await Reply(scope, send).error(error)
            return
        unread: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_whole() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, receive_whole, send)
