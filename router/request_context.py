"""What holds for every request before its endpoint: its id, and who may call.

`x-request-id` is taken from the client, echoed on every response, and becomes the start of the id
used inside. The rest of that id is ours: two clients, or a retry, may send the same one.
"""

import hmac
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import NotAuthenticated
from core.ids import RequestId, new_request_id
from router.http_reply import Reply

MAX_ID_CHARS = 128
_PROTECTED = ("/v1/", "/control/", "/debug/")


class RequestContext:
    """ASGI middleware. Puts the request id in the scope, echoes it, checks the bearer token."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str] = ()) -> None:
        self._app = app
        self._api_keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        offered = header(scope, b"x-request-id")
        if offered is not None and _is_usable(offered):
            request_id, echo = RequestId(f"{offered}.{secrets.token_hex(4)}"), offered
        else:
            request_id = new_request_id()
            echo = request_id
        scope["baton.request_id"] = request_id
        id_header = (b"x-request-id", echo.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), id_header]
            await send(message)

        if scope["path"].startswith(_PROTECTED) and not self._is_allowed(scope):
            error = NotAuthenticated("missing or wrong API key; send 'Authorization: Bearer KEY'")
            await Reply(scope, send_with_id).error(error)
            return
        await self._app(scope, receive, send_with_id)

    def _is_allowed(self, scope: Scope) -> bool:
        if not self._api_keys:
            return True
        scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
        offered = token.strip().encode()
        # Every key is compared, in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(offered, key) for key in self._api_keys]
        return scheme.lower() == "bearer" and any(matches)


def request_id_of(scope: Scope) -> RequestId:
    """The id RequestContext gave this request."""
    request_id: RequestId = scope["baton.request_id"]
    return request_id


def header(scope: Scope, name: bytes) -> str | None:
    """The first header of this lower-case name."""
    for key, value in scope["headers"]:
        if key == name:
            text: str = value.decode("latin-1")
            return text
    return None


def _is_usable(request_id: str) -> bool:
    """Printable ASCII without spaces, so that it can stand in a header and in a log line."""
    return 0 < len(request_id) <= MAX_ID_CHARS and all("!" <= char <= "~" for char in request_id)
