"""A client that streams one completion and notes when each token came."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from core.errors import ConfigError, Unavailable

_EVENT = b"data: "
_DONE = b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from the request to each of its tokens, by the monotonic clock from `asked_at_s`."""

    asked_at_s: float
    token_at_s: tuple[float, ...]

    @property
    def ttft_s(self) -> float:
        return self.token_at_s[0] - self.asked_at_s


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A router's address, the key it asks for, and the model it serves, once that is known."""

    host: str
    port: int
    api_key: str | None = None
    model: str = ""

    @property
    def headers(self) -> str:
        """Of every request; the connection ends with its answer."""
        key = "" if self.api_key is None else f"authorization: Bearer {self.api_key}\r\n"
        return f"host: {self.host}\r\nconnection: close\r\n{key}"


def parse_url(url: str) -> tuple[str, int]:
    """Host and port of an http URL. Raises ConfigError."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no URL: {error}") from error
    if host is None or parts.scheme not in {"", "http"}:
        raise ConfigError(f"{url!r} is not of the form http://HOST:PORT")
    return host, port or 80


async def served_model(endpoint: Endpoint, timeout_s: float) -> str:
    """The first model of /v1/models. Raises Unavailable when it does not tell."""
    place = f"{endpoint.host}:{endpoint.port}"
    try:
        models = await _get(endpoint, "/v1/models", timeout_s)
    except (OSError, TimeoutError) as error:
        raise Unavailable(f"no router answers at {place}: {_why(error, timeout_s)}") from error
    try:
        return str(json.loads(models)["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise Unavailable(f"what answers at {place} names no model: is it a router?") from error


async def kv_blocks(endpoint: Endpoint, timeout_s: float) -> int | None:
    """The KV blocks of a decode worker, of the smallest one; None where the server does not say."""
    try:
        body = await _get(endpoint, "/control/workers", timeout_s)
        totals = [int(w["total_blocks"]) for w in json.loads(body) if w["role"] == "decode"]
    except (OSError, TimeoutError, ValueError, LookupError, TypeError, Unavailable):
        return None
    return min((total for total in totals if total > 0), default=None)


async def _get(endpoint: Endpoint, path: str, timeout_s: float) -> bytes:
    request = f"GET {path} HTTP/1.1\r\n{endpoint.headers}\r\n"
    async with (
        asyncio.timeout(timeout_s),
        _connection(endpoint.host, endpoint.port) as (reader, writer),
    ):
        writer.write(request.encode())
        raw = await reader.read()
    if b" 200 " not in raw.partition(b"\r\n")[0]:
        raise Unavailable(f"the router refuses {path}: {_said(raw)}")
    return raw.partition(b"\r\n\r\n")[2]


async def complete(
    endpoint: Endpoint, prompt: Sequence[int], tokens: int, timeout_s: float
) -> Answer:
    """Ask with token ids for exactly so many tokens. Raises Unavailable when it is not answered."""
    fields = {"model": endpoint.model, "prompt": list(prompt), "max_tokens": tokens}
    body = json.dumps({**fields, "stream": True, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\n{endpoint.headers}"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    try:
        async with (
            asyncio.timeout(timeout_s),
            _connection(endpoint.host, endpoint.port) as (reader, writer),
        ):
            asked_at_s = time.monotonic()
            writer.write(head.encode() + body)
            times = await _read_events(reader)
    except (OSError, TimeoutError) as error:
        why = _why(error, timeout_s)
        raise Unavailable(f"the router did not answer a prompt: {why}") from error
    if not times:
        raise Unavailable("the router sent an answer without tokens")
    return Answer(asked_at_s, tuple(times[:tokens]))


def _why(error: OSError | TimeoutError, timeout_s: float) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)
    return str(error) or f"nothing came within {timeout_s:g} s"


def _said(raw: bytes) -> str:
    """What a refusal says of itself, or else its status."""
    head, _, body = raw.partition(b"\r\n\r\n")
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return head.partition(b"\r\n")[0].decode(errors="replace") or "it closed the connection"


@asynccontextmanager
async def _connection(
    host: str, port: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader) -> list[float]:
    status = await reader.readline()
    if b" 200 " not in status:
        raise Unavailable(f"the router refused a prompt: {_said(status + await reader.read())}")
    times = list[float]()
    while line := await reader.readline():
        if line.startswith(_DONE):
            break
        if line.startswith(_EVENT):
            times.append(time.monotonic())
    return times
