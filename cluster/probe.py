"""Asks a router how it is, over one plain HTTP connection each."""

import asyncio
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

_TIMEOUT_S = 5.0
_PART_BYTES = 65_536
_MAX_BYTES = 256 * _PART_BYTES


async def answers_ready(router_url: str) -> bool:
    """GET /ready answers 200: a prefill and a decode worker are routable. Never raises."""
    return _is_200(await _get(router_url, "/ready"))


async def answers(router_url: str, timeout_s: float = _TIMEOUT_S) -> bool:
    """GET /health is answered at all. Never raises."""
    return bool(await _get(router_url, "/health", timeout_s=timeout_s))


class SeenWorker(NamedTuple):
    """A worker as a router knows it."""

    worker_id: str
    role: str
    address: str


class RouterView(NamedTuple):
    """The workers that a router knows, and those of them it sends nothing to, and why."""

    workers: tuple[SeenWorker, ...] = ()
    ejected: Mapping[str, str] = MappingProxyType({})
    """failures, slow or hung."""
    unreached: Mapping[str, str] = MappingProxyType({})
    """It has no stream to them, in its words."""


async def view_of_router(router_url: str, api_key: str | None = None) -> RouterView:
    """As that router says; nobody where it does not. Never raises."""
    answer = await _get(router_url, "/control/workers", api_key)
    if not _is_200(answer):
        return RouterView()
    try:
        seen = json.loads(answer.partition(b"\r\n\r\n")[2])
        workers = [SeenWorker(str(w["worker_id"]), str(w["role"]), str(w["address"])) for w in seen]
        ejected = {str(w["worker_id"]): str(w["ejected_for"]) for w in seen if w["ejected"]}
        reasons = {str(w["worker_id"]): str(w["reason"]) for w in seen if not w["connected"]}
    except (ValueError, KeyError, TypeError):
        return RouterView()
    unreached = {worker: reason for worker, reason in reasons.items() if reason}
    return RouterView(tuple(workers), ejected, unreached)


def _is_200(answer: bytes) -> bool:
    return b" 200 " in answer.partition(b"\r\n")[0]


async def _get(
    router_url: str, path: str, api_key: str | None = None, timeout_s: float = _TIMEOUT_S
) -> bytes:
    """The whole answer; empty when there is none in time. HTTP/1.0, so it is in one piece."""
    parts = urlsplit(router_url)
    lines = [f"GET {path} HTTP/1.0", f"Host: {parts.netloc}"]
    lines += [f"Authorization: Bearer {api_key}"] if api_key is not None else []
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                writer.write("\r\n".join([*lines, "", ""]).encode())
                await writer.drain()
                return await _read(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return b""


async def _read(reader: asyncio.StreamReader) -> bytes:
    answer = bytearray()
    while len(answer) < _MAX_BYTES and (part := await reader.read(_PART_BYTES)):
        answer += part
    return bytes(answer)
