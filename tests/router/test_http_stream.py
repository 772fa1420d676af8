"""Clients that leave, stall or are slow; bursts; the end of the server."""

import asyncio

import httpx
import openai
import pytest
from http_builders import (
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

from core.errors import ConfigError
from router.http_errors import ClientTooSlow
from router.http_stream import EventBuffer
from router.serve import bind_listener
from router.types import Generated

CHAT = [{"role": "user", "content": "hello"}]
STREAM = b'{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
WHOLE = STREAM.replace(b"true", b"false")
PATH = "/v1/chat/completions"


async def until(condition):
    """Poll what has no event to wait for; the test's own deadline bounds it."""
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("body", [STREAM, WHOLE])
@pytest.mark.parametrize("first", [0, 5])
@in_loop
async def test_client_that_leaves_closes_the_generator(tmp_path, body, first):
    generator = ScriptedGenerator(endless(first=first))
    async with running(generator, model_directory(tmp_path)) as server:
        connection = await raw_connection(server.port)
        await asyncio.get_running_loop().sock_sendall(connection, raw_post(PATH, body))
        await generator.until_running(1)
        connection.close()
        await generator.until_running(0)
        await until(lambda: server.sample("baton_requests_in_flight") == 0)
        gone = server.sample("baton_http_requests_total", endpoint=PATH, status="499")
    assert gone == 1


@in_loop
async def test_leaving_the_official_clients_stream_closes_the_generator(tmp_path):
    generator = ScriptedGenerator(endless(first=3))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await generator.until_running(0)


@in_loop
async def test_leaving_in_the_middle_of_the_body_starts_nothing(tmp_path):
    generator = ScriptedGenerator(endless())
    async with running(generator, model_directory(tmp_path)) as server:
        connection = await raw_connection(server.port)
        post = raw_post(PATH, STREAM)
        await asyncio.get_running_loop().sock_sendall(connection, post[:-5])
        await until(lambda: server.sample("baton_requests_in_flight") == 1)
        connection.close()
        await until(lambda: server.sample("baton_requests_in_flight") == 0)
    assert generator.requests == []


@in_loop
async def test_slow_client_is_cut_and_another_proceeds(tmp_path, caplog):
    async def by_seed(request):
        script = endless() if request.sampling.seed == 7 else saying("a fox")
        async for item in script(request):
            yield item

    generator = ScriptedGenerator(by_seed)
    folder = model_directory(tmp_path)
    async with running(generator, folder, stream_buffer_events=64) as server:
        stalled = await raw_connection(server.port, receive_buffer=4096)
        post = raw_post(PATH, STREAM.replace(b"{", b'{"seed": 7, ', 1))
        await asyncio.get_running_loop().sock_sendall(stalled, post)
        await generator.until_running(1)
        async with server.client() as client:
            other = await client.chat.completions.create(model=MODEL, messages=CHAT)
        await generator.until_running(0)
        await until(lambda: server.sample("baton_requests_in_flight") == 0)
        cut = server.sample("baton_slow_clients_cancelled_total")
        received = await drained(stalled)
    assert cut == 1
    assert other.choices[0].message.content == "a fox"
    assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received
    assert not [r for r in caplog.records if r.exc_info or "ASGI" in r.getMessage()]


async def drained(connection):
    """All that was under way when the server dropped the connection."""
    loop, received = asyncio.get_running_loop(), b""
    try:
        while chunk := await loop.sock_recv(connection, 65536):
            received += chunk
    except ConnectionResetError:
        pass
    finally:
        connection.close()
    return received


@in_loop
async def test_burst_larger_than_the_buffer_is_no_slow_client(tmp_path):
    async def burst(request):
        for _ in range(5000):
            yield Generated(tokens=(50,))
        async for item in saying("!")(request):
            yield item

    generator = ScriptedGenerator(burst)
    folder = model_directory(tmp_path)
    async with (
        running(generator, folder, stream_buffer_events=16) as server,
        server.client() as client,
    ):
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        chunks = [chunk async for chunk in stream]
        events = server.sample("baton_stream_events_total")
        coalesced = server.sample("baton_stream_events_coalesced_total")
    assert len(chunks) == 5000 + 3  # the role, the last piece and the finish
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert events == len(chunks)
    assert 0 < coalesced < events


@in_loop
async def test_tokens_of_one_item_are_one_event_each(tmp_path):
    async def in_threes(request):
        yield Generated(tokens=(50, 51, 52))
        async for item in saying("!")(request):
            yield item

    generator = ScriptedGenerator(in_threes)
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        answer = await http.post(f"{server.url}{PATH}", content=STREAM)
    events = answer.text.split("\n\n")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert events[-2:] == ["data: [DONE]", ""]
    assert len(events) == 1 + 3 + 1 + 1 + 2  # role, three, "!", finish, done
    assert all(event.startswith("data: {") for event in events[:-2])


@in_loop
async def test_buffer_gives_the_error_after_the_events_before_it():
    buffer = EventBuffer(max_events=4, grace_s=1.0, producers=2)
    buffer.put(b"a")
    buffer.fail(ConfigError("first"))
    buffer.fail(ConfigError("second"))
    assert await buffer.take() == [b"a"]
    with pytest.raises(ConfigError, match="first"):
        await buffer.take()


@in_loop
async def test_buffer_ends_when_every_producer_has_closed():
    buffer = EventBuffer(max_events=4, grace_s=1.0, producers=2)
    buffer.close()
    waiting = asyncio.ensure_future(buffer.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    buffer.close()
    assert await waiting == []


@in_loop
async def test_buffer_that_nobody_takes_raises_after_its_grace():
    buffer = EventBuffer(max_events=1, grace_s=0.01, producers=1)
    buffer.put(b"a")
    assert buffer.full
    with pytest.raises(ClientTooSlow):
        await buffer.room()


@in_loop
async def test_stop_lets_a_running_answer_finish(tmp_path):
    proceed = asyncio.Event()

    async def held(request):
        yield Generated(tokens=(50,))
        await proceed.wait()
        async for item in saying("end")(request):
            yield item

    generator = ScriptedGenerator(held)
    folder = model_directory(tmp_path)
    async with running(generator, folder, grace_s=10) as server, server.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        server.stop.set()
        await until(lambda: not accepts(server.port))
        proceed.set()
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices[0].finish_reason == "stop"


@in_loop
async def test_what_outlives_the_grace_ends_with_an_error_event(tmp_path):
    generator = ScriptedGenerator(endless(first=2))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        server.stop.set()
        with pytest.raises(openai.APIError, match="shutting down"):
            [chunk async for chunk in stream]
        await generator.until_running(0)


@in_loop
async def test_server_that_is_cancelled_leaves_nothing_running(tmp_path):
    generator = ScriptedGenerator(endless(first=2))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        server.serving.cancel()
        with pytest.raises(openai.APIError, match="shutting down"):
            [chunk async for chunk in stream]
        await asyncio.wait([server.serving])
        assert generator.running == 0
        assert not accepts(server.port)


def accepts(port):
    try:
        bind_listener("127.0.0.1", port).close()
    except ConfigError:
        return True
    return False


def test_port_in_use_is_one_clear_sentence():
    taken = bind_listener("127.0.0.1", 0)
    try:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use"):
            bind_listener("127.0.0.1", port)
    finally:
        taken.close()


def test_host_that_is_no_address_is_one_clear_sentence():
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1:0"):
        bind_listener("203.0.113.1", 0)
