"""How an error looks to an HTTP client: OpenAI's shape, whatever went wrong.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

import math

import orjson

from core.errors import (
    BatonError,
    Cancelled,
    NotAuthenticated,
    NoWorkers,
    Overloaded,
    Unavailable,
    UserError,
)

Header = tuple[bytes, bytes]


class ClientGone(Cancelled):
    """The connection ended before the answer did."""


class ClientTooSlow(Cancelled):
    """The client left more unread than it may."""

    code = "client_too_slow"


class TooManyConnections(Unavailable):
    """The router keeps as many connections as it may."""

    code = "too_many_connections"
    retry_after_s = 1.0


class HeadTooLarge(UserError):
    """A request's line and headers are over their bound."""

    http_status = 431
    code = "head_too_large"


class HeadTooSlow(UserError):
    """A request's line and headers were not there in time."""

    http_status = 408
    code = "head_too_slow"


class BodyTooSlow(UserError):
    """A request's body was not there in time."""

    http_status = 408
    code = "body_too_slow"


def error_body(error: BatonError) -> bytes:
    """The JSON body, also the data of an error event in a stream."""
    return orjson.dumps(
        {
            "error": {
                "message": error.message,
                "type": error.error_type,
                "param": error.param,
                "code": error.code,
            }
        }
    )


def error_headers(error: BatonError) -> list[Header]:
    """Headers an error asks for, besides the content's."""
    if isinstance(error, Overloaded | NoWorkers | TooManyConnections):
        return [(b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s)))]
    if isinstance(error, BodyTooSlow):
        return [(b"connection", b"close")]  # what remains of it is not waited for
    if isinstance(error, NotAuthenticated):
        return [(b"www-authenticate", b"Bearer")]
    return []
