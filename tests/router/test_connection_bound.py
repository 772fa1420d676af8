"""A router keeps a bounded number of connections, and says so to whoever is beyond it."""

import asyncio
import json
import subprocess
import sys
from contextlib import suppress

import pytest

from router import http_connection
from router.descriptors import clients_within
from tests.router.http_builders import (
    ScriptedGenerator,
    in_loop,
    model_directory,
    raw_connection,
    running,
    saying,
)


def get(path):
    return b"GET " + path + b" HTTP/1.1\r\nhost: x\r\n\r\n"


GET = get(b"/health")
MODELS = get(b"/v1/models")


async def read_to_end(connection):
    answer = b""
    while piece := await asyncio.get_running_loop().sock_recv(connection, 65536):
        answer += piece
    return answer


async def asked(connection, request_bytes=MODELS):
    """The first line of an answer."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request_bytes)
    return (await loop.sock_recv(connection, 65536)).partition(b"\r\n")[0]


@pytest.mark.parametrize(
    "request_bytes", [b"", b"GET /health HT", MODELS, get(b"/ready"), get(b"/healthy")]
)
@in_loop
async def test_connection_beyond_the_bound_is_told_so_and_the_others_go_on(
    tmp_path, request_bytes, monkeypatch
):
    monkeypatch.setattr(http_connection, "_LINGER_S", 0.2)
    generator = ScriptedGenerator(saying("a fox"))
    async with running(generator, model_directory(tmp_path), max_connections=2) as server:
        first, second = [await raw_connection(server.port) for _ in range(2)]
        with first, second:
            assert await asked(first) == await asked(second) == b"HTTP/1.1 200 OK"
            with await raw_connection(server.port) as third:
                await asyncio.get_running_loop().sock_sendall(third, request_bytes)
                head, _, body = (await read_to_end(third)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"\r\nretry-after: 1" in head and b"\r\nconnection: close" in head
            assert json.loads(body)["error"]["code"] == "too_many_connections"
            assert await asked(first) == b"HTTP/1.1 200 OK"
            second.close()
            assert await until_served(server.port)


@pytest.mark.parametrize(
    "path", [b"/health", b"/health?from=kubelet", b"/metrics", b"/control/workers"]
)
@in_loop
async def test_a_full_router_answers_once_what_tells_that_it_lives(tmp_path, path):
    generator = ScriptedGenerator(saying("a fox"))
    async with running(generator, model_directory(tmp_path), max_connections=1) as server:
        with await raw_connection(server.port) as kept:
            assert await asked(kept) == b"HTTP/1.1 200 OK"
            with await raw_connection(server.port) as probe:
                await asyncio.get_running_loop().sock_sendall(probe, get(path))
                answer = await read_to_end(probe)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\nconnection: close\r\n" in answer
            with await raw_connection(server.port) as other:
                assert b" 503 " in await asked(other)


@in_loop
async def test_connections_beyond_the_bound_are_few_and_hold_no_place(tmp_path, monkeypatch):
    monkeypatch.setattr(http_connection, "MAX_BEYOND", 1)
    generator = ScriptedGenerator(saying("a fox"))
    async with running(generator, model_directory(tmp_path), max_connections=1) as server:
        kept = await raw_connection(server.port)
        with kept:
            assert await asked(kept) == b"HTTP/1.1 200 OK"
            silent, told = [await raw_connection(server.port) for _ in range(2)]
            with silent, told:
                assert b" 503 " in await asked(told)  # and it stays open at its end
                with suppress(ConnectionError):
                    assert await read_to_end(silent) == b""
                with await raw_connection(server.port) as probe:
                    assert await asked(probe, GET) == b"HTTP/1.1 200 OK"
                kept.close()
                assert await until_served(server.port)


async def until_served(port):
    """A new connection is, as soon as the server has seen that another one has ended."""
    async with asyncio.timeout(10):
        while True:
            with await raw_connection(port) as connection:
                try:
                    if await asked(connection) == b"HTTP/1.1 200 OK":
                        return True
                except ConnectionError:
                    pass


@pytest.mark.parametrize(
    ("limit", "workers", "room"),
    [
        (100_000, 4, 16_384),
        (17_412, 4, 16_384),
        (17_000, 4, 15_972),
        (17_000, 2048, 13_928),
        (1024, 4, 512),
    ],
)
def test_clients_leave_files_for_what_is_no_client(limit, workers, room):
    assert clients_within(limit, 16_384, workers) == room


LIMITED = """
import logging, resource
from router.descriptors import room_for_clients
logging.basicConfig(format="%(message)s")
resource.setrlimit(resource.RLIMIT_NOFILE, (256, {hard}))
print(room_for_clients(1000, 100), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("hard", "room", "warned"), [(4096, "1000 2124", False), (1500, "750 1500", True)]
)
def test_the_process_raises_its_own_limit_and_warns_where_that_is_not_enough(hard, room, warned):
    ran = python(LIMITED.format(hard=hard))
    assert ran.stdout.strip() == room
    assert ("ulimit -Hn" in ran.stderr) is warned


EXHAUSTED = """
import asyncio, logging, resource, socket, time
import uvloop
from router import serve as server
from router.serve import bind_listener, serve

logging.basicConfig(format="%(message)s")
server._LOOK_EVERY_S = 0.05

async def app(scope, receive, send):
    head = {"type": "http.response.start", "status": 200}
    await send({**head, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})

async def served(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(b"GET / HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
        return (await reader.read(4096)).startswith(b"HTTP/1.1 200")
    finally:
        writer.close()

async def main():
    listener, stop = bind_listener("127.0.0.1", 0), asyncio.Event()
    port = listener.getsockname()[1]
    serving = asyncio.create_task(serve(app, listener, stop=stop))
    print(await served(port))
    await asyncio.sleep(0.2)  # both ends of that connection are closed
    waiting = [socket.socket() for _ in range(20)]
    hoard = []
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limit))
    try:
        while True:
            hoard.append(socket.socket())
    except OSError:
        pass
    hoard.pop().close()  # which the first of those that wait takes
    for one in waiting:
        one.connect(("127.0.0.1", port))
    began_s = time.process_time()
    await asyncio.sleep(1.0)
    print(time.process_time() - began_s < 0.5, serving.done())
    for one in (*waiting, *hoard):
        one.close()
    print(await served(port))
    stop.set()
    await serving

uvloop.run(main())
"""


def test_running_out_of_files_is_a_warning_and_the_server_goes_on():
    ran = python(EXHAUSTED)
    assert ran.stdout.split() == ["True", "True", "False", "True"], ran.stderr
    assert ran.stderr.count("router_out_of_files") == 1
    assert "ulimit -n" in ran.stderr


def python(program):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
