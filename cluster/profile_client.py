"""A client that streams one completion and notes when each token came."""

import asyncio
import json
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
    """A router's address, and the model it serves."""

    host: str
    port: int
    model: str


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


async def served_model(host: str, port: int, timeout_s: float) -> str:
    """The first model of /v1/models. Raises Unavailable when nobody answers."""
    try:
        models = await _get(host, port, "/v1/models", timeout_s)
        return str(json.loads(models)["data"][0]["id"])
    except (OSError, TimeoutError, ValueError, LookupError, TypeError) as error:
        raise Unavailable(f"no router answers at {host}:{port}: {error!r}") from error


async def kv_blocks(endpoint: Endpoint, timeout_s: float) -> int | None:
    """The KV blocks of a decode worker, of the smallest one; None where the server does not say."""
    try:
        body = await _get(endpoint.host, endpoint.port, "/control/workers", timeout_s)
        totals = [int(w["total_blocks"]) for w in json.loads(body) if w["role"] == "decode"]
    except (OSError, TimeoutError, ValueError, LookupError, TypeError):
        return None
    return min((total for total in totals if total > 0), default=None)


async def _get(host: str, port: int, path: str, timeout_s: float) -> bytes:
    request = f"GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
    async with asyncio.timeout(timeout_s), _connection(host, port) as (reader, writer):
        writer.write(request.encode())
        raw = await reader.read()
    return raw.partition(b"\r\n\r\n")[2]


async def complete(
    endpoint: Endpoint, prompt: Sequence[int], tokens: int, timeout_s: float
) -> Answer:
    """Ask with token ids for exactly so many tokens. Raises Unavailable when it is not answered."""
    fields = {"model": endpoint.model, "prompt": list(prompt), "max_tokens": tokens}
    body = json.dumps({**fields, "stream": True, "ignore_eos": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {endpoint.host}\r\nconnection: close\r\n"
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
        raise Unavailable(f"the router did not answer a prompt: {error!r}") from error
    if not times:
        raise Unavailable("the router sent an answer without tokens")
    return Answer(asked_at_s, tuple(times[:tokens]))


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
        rest = await reader.read(2000)
        raise Unavailable(f"the router refused a prompt: {rest.partition(b'{')[2][:200]!r}")
    times = list[float]()
    while line := await reader.readline():
        if line.startswith(_DONE):
            break
        if line.startswith(_EVENT):
            times.append(time.monotonic())
    return times
