"""What a client may do to a connection: how long it may keep it waiting, and with how much."""

import asyncio
import json
import logging

import pytest
import uvicorn
from uvicorn.server import ServerState

from router.http_connection import (
    KEEP_ALIVE_S,
    MAX_AHEAD_BYTES,
    MAX_HEAD_BYTES,
    MAX_PIPELINED,
    ConnectionBound,
    HttpConnection,
)
from tests.router.http_builders import (
    MODEL,
    ScriptedGenerator,
    endless,
    in_loop,
    model_directory,
    raw_connection,
    raw_post,
    running,
    saying,
)

HEAD_TIMEOUT_S = 15.0
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
UPLOAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
COMPLETION = json.dumps({"model": MODEL, "prompt": "a fox", "max_tokens": 9}).encode()


class Transport:
    """Notes what is done with it."""

    def __init__(self):
        self.written = b""
        self.closed = self.aborted = self.paused = self.ended = False

    def get_extra_info(self, name):
        return ("10.0.0.7", 5123) if name == "peername" else None

    def write(self, data):
        self.written += data

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def write_eof(self):
        self.ended = True

    def abort(self):
        self.closed = self.aborted = True

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False


class App:
    """Reads a request, then waits for `proceed` to answer it."""

    def __init__(self, *, reads=True):
        self.reads = reads
        self.proceed = asyncio.Event()
        self.paths = []

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        while self.reads and (await receive())["more_body"]:
            pass
        await self.proceed.wait()
        head = {"status": 200, "headers": [(b"content-length", b"0")]}
        await send({"type": "http.response.start", **head})
        await send({"type": "http.response.body"})


def connected(app):
    config = uvicorn.Config(app, lifespan="off", log_config=None, ws="none")
    bound, transport = ConnectionBound(1), Transport()
    connection = HttpConnection(config, ServerState(), {}, bound=bound)
    connection.connection_made(transport)
    return connection, transport, asyncio.get_running_loop().time()


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


# -- how long -----------------------------------------------------------------------------------


@in_loop
async def test_connection_on_which_nothing_comes_is_closed_like_an_idle_one():
    connection, transport, now_s = connected(App())
    connection.expire(now_s + KEEP_ALIVE_S - 1, HEAD_TIMEOUT_S)
    assert not transport.closed
    connection.expire(now_s + KEEP_ALIVE_S + 1, HEAD_TIMEOUT_S)
    assert transport.closed
    assert not transport.written


@pytest.mark.parametrize("before", [b"", GET], ids=["first", "second"])
@in_loop
async def test_half_a_head_is_refused_after_a_while(before):
    app = App()
    app.proceed.set()
    connection, transport, now_s = connected(app)
    connection.data_received(before + UPLOAD[:30])
    await turns()
    connection.data_received(UPLOAD[30:40])  # more of it grants no more time
    connection.expire(now_s + HEAD_TIMEOUT_S - 1, HEAD_TIMEOUT_S)
    assert not transport.closed
    connection.expire(now_s + HEAD_TIMEOUT_S + 1, HEAD_TIMEOUT_S)
    assert transport.ended
    assert b"HTTP/1.1 408 Request Timeout\r\n" in transport.written
    assert b'"head_too_slow"' in transport.written


@in_loop
async def test_empty_lines_before_a_head_grant_no_more_time():
    connection, transport, now_s = connected(App())
    connection.data_received(b"\r\n")
    connection.expire(now_s + HEAD_TIMEOUT_S + 1, HEAD_TIMEOUT_S)
    assert transport.ended


@pytest.mark.parametrize("request_bytes", [GET, UPLOAD], ids=["complete", "body missing"])
@in_loop
async def test_running_request_is_left_to_its_own_deadline(request_bytes):
    app = App()
    connection, transport, now_s = connected(app)
    connection.data_received(request_bytes)
    await turns()
    connection.expire(now_s + 10_000, HEAD_TIMEOUT_S)
    assert app.paths
    assert not transport.closed


@in_loop
async def test_rest_of_a_body_is_not_awaited_for_ever_behind_its_response():
    app = App(reads=False)
    app.proceed.set()
    connection, transport, now_s = connected(app)
    connection.data_received(UPLOAD)
    await turns()
    assert b"200 OK" in transport.written
    connection.expire(now_s + 10, HEAD_TIMEOUT_S)
    assert not transport.closed
    connection.expire(now_s + 40, HEAD_TIMEOUT_S)
    assert transport.aborted


@in_loop
async def test_client_that_does_not_take_its_last_answer_is_dropped():
    connection, transport, now_s = connected(App())
    transport.close()
    connection.expire(now_s + 40, HEAD_TIMEOUT_S)
    assert transport.aborted


@in_loop
async def test_server_looks_at_its_connections(tmp_path):
    folder, generator = model_directory(tmp_path), ScriptedGenerator(saying("a"))
    async with running(generator, folder, head_timeout_s=0.05) as server:
        connection = await raw_connection(server.port)
        with connection:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(connection, UPLOAD[:30])
            answer = await read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")


# -- how much -----------------------------------------------------------------------------------


@pytest.mark.parametrize("piece_bytes", [1000, 10**6], ids=["pieces", "one piece"])
@in_loop
async def test_large_head_is_refused_and_the_connection_closed(piece_bytes):
    app = App()
    connection, transport, _ = connected(app)
    head = GET[:-2] + b"x: " + bytes(b"a" * MAX_HEAD_BYTES) + b"\r\n\r\n"
    for start in range(0, len(head), piece_bytes):
        connection.data_received(head[start : start + piece_bytes])
    await turns()
    assert transport.ended
    assert transport.written.startswith(b"HTTP/1.1 431 Request Header Fields Too Large\r\n")
    assert transport.written.endswith(b'"param":null,"code":"head_too_large"}}')
    assert not app.paths


@pytest.mark.parametrize("answered", [False, True])
@in_loop
async def test_what_follows_a_body_in_place_of_its_end_is_bounded_like_a_head(answered):
    app = App(reads=not answered)
    app.proceed.set()
    connection, transport, _ = connected(app)
    head = UPLOAD.replace(b"content-length: 100", b"transfer-encoding: chunked")
    connection.data_received(head)
    for _ in range(5):
        connection.data_received(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await turns()
    assert not transport.closed
    connection.data_received(b"0\r\nx: ")
    for _ in range(0, MAX_HEAD_BYTES + 1000, 1000):
        connection.data_received(b"a" * 1000)
    assert transport.closed
    assert (b"HTTP/1.1 431 " in transport.written) != answered


@in_loop
async def test_refused_client_may_send_on_for_a_moment_and_see_its_answer():
    connection, transport, now_s = connected(App())
    connection.data_received(b"x" * (MAX_HEAD_BYTES + 1))
    connection.data_received(b"x" * MAX_HEAD_BYTES)
    connection.expire(now_s + 1, HEAD_TIMEOUT_S)
    assert transport.written.count(b"HTTP/1.1 ") == 1
    assert not transport.closed
    connection.expire(now_s + 5, HEAD_TIMEOUT_S)
    assert transport.aborted


@in_loop
async def test_endless_head_is_answered_and_cut(tmp_path):
    folder, generator = model_directory(tmp_path), ScriptedGenerator(saying("a"))
    async with running(generator, folder) as server:
        connection, loop = await raw_connection(server.port), asyncio.get_running_loop()
        with connection:
            await loop.sock_sendall(connection, GET[:-2] + b"x: " + b"a" * 1_000_000)
            answer = await read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 431 ")


@in_loop
async def test_what_is_no_http_beside_a_request_ends_the_connection():
    app = App()
    connection, transport, _ = connected(app)
    connection.data_received(GET + b"no\x00HTTP")
    app.proceed.set()
    await turns()
    assert transport.closed
    assert transport.written.startswith(b"HTTP/1.1 400 ")


@in_loop
async def test_what_is_no_http_is_refused_in_openais_shape_and_the_log_says_who_sent_it(caplog):
    caplog.set_level("INFO")
    connection, transport, _ = connected(App())
    connection.data_received(b"\x16\x03\x01\x02\x00")
    assert caplog.messages == [
        "connection_refused client=10.0.0.7:5123 error=invalid_request"
        ' message="this is no HTTP request"'
    ]
    assert transport.ended
    assert transport.written.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b'"message":"this is no HTTP request"' in transport.written


@in_loop
async def test_a_request_to_speak_another_protocol_is_answered_as_it_stands(caplog):
    app = App()
    connection, transport, _ = connected(app)
    upgrade = b"connection: upgrade\r\nupgrade: websocket\r\n\r\n"
    connection.data_received(GET[:-2] + upgrade)
    app.proceed.set()
    await turns()
    assert transport.written.startswith(b"HTTP/1.1 200 ")
    assert not caplog.messages, "no advice to install what this server does not use"


@pytest.mark.parametrize("apart", [True, False])
@in_loop
async def test_requests_that_come_during_a_response_are_answered_in_order(apart):
    app = App()
    connection, transport, _ = connected(app)
    post = UPLOAD + b"x" * 100
    requests = [GET, post, GET.replace(b"health", b"ready"), post[:120], post[120:], GET]
    for piece in requests if apart else [b"".join(requests[:4]), b"".join(requests[4:])]:
        connection.data_received(piece)
        await turns(2)
    app.proceed.set()
    await turns(40)
    completions = "/v1/completions"
    assert app.paths == ["/health", completions, "/ready", completions, "/health"]
    assert transport.written.count(b"200 OK") == 5
    assert not transport.closed


@in_loop
async def test_connection_is_read_on_during_a_response_within_a_bound():
    app = App()
    connection, transport, _ = connected(app)
    connection.data_received(GET)
    connection.data_received(b"x" * MAX_AHEAD_BYTES)
    assert not transport.paused
    connection.data_received(b"x")
    assert transport.paused
    app.proceed.set()
    await turns()
    assert not transport.paused


@in_loop
async def test_client_that_sends_too_many_requests_in_one_piece_is_dropped(caplog):
    caplog.set_level(logging.INFO)
    connection, transport, _ = connected(App())
    connection.data_received(GET * (MAX_PIPELINED + 10))
    assert transport.aborted
    assert "too many requests in one piece" in caplog.text


@pytest.mark.parametrize("further", [GET, UPLOAD, b"nonsense"])
@in_loop
async def test_client_that_sent_more_and_went_is_seen_to_go(tmp_path, further):
    generator = ScriptedGenerator(endless())
    async with running(generator, model_directory(tmp_path)) as server:
        connection = await raw_connection(server.port)
        with connection:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(connection, raw_post("/v1/completions", COMPLETION))
            await generator.until_running(1)
            await loop.sock_sendall(connection, further)
        await generator.until_running(0)


@pytest.mark.parametrize("stream", [True, False])
@in_loop
async def test_http_1_0_has_a_body_without_chunks_that_ends_with_the_connection(tmp_path, stream):
    generator, loop = ScriptedGenerator(saying("a fox")), asyncio.get_running_loop()
    body = json.dumps({"model": MODEL, "prompt": "a fox", "stream": stream}).encode()
    async with running(generator, model_directory(tmp_path)) as server:
        connection = await raw_connection(server.port)
        with connection:
            request = raw_post("/v1/completions", body).replace(b"HTTP/1.1", b"HTTP/1.0")
            await loop.sock_sendall(connection, request)
            head, _, text = (await read_to_end(connection)).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert b"connection: close" in head
    if stream:
        events = text.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])
    else:
        assert json.loads(text)["choices"][0]["text"] == "a fox"


async def read_to_end(connection):
    answer = b""
    while piece := await asyncio.get_running_loop().sock_recv(connection, 65536):
        answer += piece
    return answer
