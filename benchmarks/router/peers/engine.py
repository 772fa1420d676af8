"""Mock workers of peers: the HTTP API of SGLang's or vLLM's servers, without a model.

    python -m benchmarks.router.peers.engine sglang|vllm MODEL PREFILL_PORTS DECODE_PORTS

Ports are joined by commas; one process serves all of them, on 127.0.0.1. It prints `ready`, then
reads `step SECONDS` lines as the stand-ins of Baton do. At each step every running answer gets one
token, one SSE event written on its own, so that a router sees what a decode step makes and no more
at a time; 0 seconds are one turn of the event loop. A prefill worker answers one token at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from functools import partial
from typing import cast

import uvloop

_HEAD_END = b"\r\n\r\n"
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n"
)
_DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_CHAT = b"/v1/chat/completions"
_BACKLOG = 1024


class Engine:
    """What all connections share."""

    def __init__(self, api: str, model: str) -> None:
        self.step_s = 0.0
        self.running: dict[Connection, int] = {}
        """Answers under way, and how many of their tokens are left."""
        self.busy = asyncio.Event()
        self.pages = {path: _response(page) for path, page in _pages(api, model).items()}
        self.empty = _response({})
        self.unary = _response(_unary(model))
        self.event, self.last_event = _event(model, None), _event(model, "length")

    async def run(self) -> None:
        """Steps at their own pace, for ever."""
        loop = asyncio.get_running_loop()
        next_at_s = loop.time()
        while True:
            if not self.running:
                self.busy.clear()
                await self.busy.wait()
                next_at_s = loop.time()
            next_at_s = max(next_at_s + self.step_s, loop.time())
            await asyncio.sleep(next_at_s - loop.time())
            for connection in list(self.running):
                self._token(connection)

    def _token(self, connection: Connection) -> None:
        left = self.running[connection] = self.running[connection] - 1
        if left > 0:
            connection.send(self.event)
            return
        del self.running[connection]
        connection.send(self.last_event + _DONE)  # together, as the engines do


class Connection(asyncio.Protocol):
    """One connection of a router; requests on it come one after the other."""

    def __init__(self, engine: Engine, *, prefill: bool) -> None:
        self._engine = engine
        self._prefill = prefill
        self._read = b""
        self._transport: asyncio.Transport | None = None
        self._fd = -1

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._fd = transport.get_extra_info("socket").fileno()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._engine.running.pop(self, None)

    def send(self, data: bytes) -> None:
        """At once, in a packet of its own: the loop's transport would collect a turn's writes."""
        if self._transport is None:
            return
        sent = 0
        if not self._transport.get_write_buffer_size():
            try:
                sent = os.write(self._fd, data)
            except (BlockingIOError, BrokenPipeError, ConnectionResetError):
                sent = 0  # the transport waits, or says that the router has gone
        if sent < len(data):
            self._transport.write(data[sent:])

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (request := self._next()) is not None:
            self._answer(*request)

    def _next(self) -> tuple[bytes, bytes] | None:
        """Path and body of a request that is there in whole."""
        head, found, rest = self._read.partition(_HEAD_END)
        if not found:
            return None
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            body = _unchunked(rest)
            if body is None:
                return None
            content, self._read = body
        else:
            _, there, length = lower.partition(b"\r\ncontent-length:")
            size = int(length.partition(b"\r\n")[0]) if there else 0
            if len(rest) < size:
                return None
            content, self._read = rest[:size], rest[size:]
        return head.split(b" ", 2)[1].partition(b"?")[0], content

    def _answer(self, path: bytes, body: bytes) -> None:
        engine = self._engine
        if path != _CHAT:
            self.send(engine.pages.get(path, engine.empty))
            return
        asked = json.loads(body)
        if not asked.get("stream"):
            self.send(engine.unary)
        elif self._prefill:
            self.send(_STREAM_HEAD + engine.last_event + _DONE)
        else:
            self.send(_STREAM_HEAD)
            # routers write the newer name where a client wrote the older one
            limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or 1
            engine.running[self] = int(limit)
            engine.busy.set()


def _unchunked(data: bytes) -> tuple[bytes, bytes] | None:
    """A chunked body and what comes after it; None while it is incomplete."""
    body = b""
    while True:
        size, found, rest = data.partition(b"\r\n")
        if not found:
            return None
        length = int(size, 16)
        if len(rest) < length + 2:
            return None
        body, data = body + rest[:length], rest[length + 2 :]
        if length == 0:
            return body, data


def _pages(api: str, model: str) -> Mapping[bytes, object]:
    """What a router asks of a worker before it sends requests."""
    info = {
        "model_path": model,
        "tokenizer_path": model,
        "served_model_name": model,
        "is_generation": True,
        "tp_size": 1,
        "dp_size": 1,
        "version": "0.5.0",
        "max_total_num_tokens": 100_000,
        "internal_states": [{}],
    }
    served = {"id": model, "object": "model", "created": 1, "owned_by": api, "root": model}
    load = {"dp_rank": 0, "num_reqs": 0, "num_waiting_reqs": 0, "num_tokens": 0}
    return {
        b"/v1/models": {"object": "list", "data": [{**served, "max_model_len": 131_072}]},
        b"/get_model_info": info,
        b"/model_info": info,
        b"/get_server_info": info,
        b"/server_info": info,
        b"/version": {"version": "0.12.0"},
        b"/get_load": [load],
    }


def _unary(model: str) -> object:
    """A prefill's answer where the router asks for it apart, as vLLM's does."""
    message = {"role": "assistant", "content": " word"}
    return {
        "id": "cmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 1, "total_tokens": 201},
        "kv_transfer_params": {
            "remote_engine_id": "e",
            "remote_block_ids": [1, 2],
            "remote_host": "127.0.0.1",
            "remote_port": 5600,
            "do_remote_prefill": True,
            "do_remote_decode": False,
        },
    }


def _event(model: str, finish: str | None) -> bytes:
    event = {
        "id": "cmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [{"index": 0, "delta": {"content": " word"}, "finish_reason": finish}],
    }
    data = f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(data), data)


def _response(page: object) -> bytes:
    body = json.dumps(page).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return head.encode() + _HEAD_END + body


async def serve(engine: Engine, prefill: list[int], decode: list[int]) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    for ports, is_prefill in ((prefill, True), (decode, False)):
        for port in ports:
            await loop.create_server(
                partial(Connection, engine, prefill=is_prefill),
                "127.0.0.1",
                port,
                backlog=_BACKLOG,
            )
    stepping = asyncio.create_task(engine.run())
    print("ready", flush=True)
    while line := await reader.readline():
        word, _, value = line.decode().partition(" ")
        if word == "step":
            engine.step_s = float(value)
    stepping.cancel()


def main() -> None:
    api, model = sys.argv[1:3]
    prefill, decode = ([int(port) for port in ports.split(",")] for ports in sys.argv[3:5])
    engine = Engine(api, model)
    uvloop.run(serve(engine, prefill, decode))


if __name__ == "__main__":
    main()
