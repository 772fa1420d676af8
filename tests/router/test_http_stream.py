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

from core.errors import ConfigError, InternalError
from core.sampling import FinishReason
from router.http_errors import ClientTooSlow
from router.http_reply import LINE_EXTENSION, Reply
from router.http_stream import MAX_HELD_BYTES, STARTED_A_TURN, Outflow
from router.serve import bind_listener
from router.types import Generated

CHAT = [{"role": "user", "content": "hello"}]
STREAM = b'{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
WHOLE = STREAM.replace(b"true", b"false")
LARGE = STREAM.replace(b"{", b'{"user": "%b", ' % (b"x" * 200_000), 1)
"""While such a body comes, the server stops reading for a while."""
PATH = "/v1/chat/completions"


async def until(condition):
    """Poll what has no event to wait for; the test's own deadline bounds it."""
    while not condition():
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("body", [STREAM, WHOLE, LARGE], ids=["stream", "whole", "large"])
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


@pytest.mark.parametrize("body", [LARGE, LARGE.replace(b"true", b"false")], ids=["stream", "whole"])
@in_loop
async def test_a_client_that_leaves_is_noticed_though_its_large_body_came_after_the_head(
    tmp_path, body
):
    generator = ScriptedGenerator(endless(first=0))
    async with running(generator, model_directory(tmp_path)) as server:
        connection, loop = await raw_connection(server.port), asyncio.get_running_loop()
        post = raw_post(PATH, body)
        await loop.sock_sendall(connection, post[:1000])
        await until(lambda: server.sample("baton_requests_in_flight") == 1)
        await loop.sock_sendall(connection, post[1000:])
        await generator.until_running(1)
        connection.close()
        await generator.until_running(0)


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


class Client:
    """A connection that takes chunks while it is open, and the reply that starts it."""

    def __init__(self, *, reads=True):
        self.chunks = []
        self.started = False
        self._open = asyncio.Event()
        if reads:
            self._open.set()

    @property
    def paused(self):
        return not self._open.is_set()

    def put(self, chunk):
        self.chunks.append(chunk)

    async def drain(self):
        await self._open.wait()

    async def start_stream(self):
        await self.drain()
        return self.start_stream_now()

    def start_stream_now(self):
        self.started = True
        return self

    def stop_reading(self):
        self._open.clear()

    def read_again(self):
        self._open.set()


def outflow(client, producers=1, max_events=4, grace_s=1.0):
    return Outflow(
        client, asyncio.ensure_future, max_events=max_events, grace_s=grace_s, producers=producers
    )


def begun(**settings):
    """An outflow that writes through, its client, and the wait for its end: one event is out."""
    client = Client()
    flow = outflow(client, **settings)
    flow.put(b"first")
    assert client.chunks == [b"first"]
    client.chunks.clear()
    return flow, client, asyncio.ensure_future(flow.rest())


@in_loop
async def test_outflow_raises_the_first_error_after_the_events_before_it():
    client = Client()
    flow = outflow(client, producers=2)
    flow.put(b"a")
    flow.fail(ConfigError("first"))
    flow.fail(ConfigError("second"))
    with pytest.raises(ConfigError, match="first"):
        await flow.rest()
    assert client.chunks == [b"a"]


@in_loop
async def test_outflow_that_fails_before_any_event_starts_no_response():
    client = Client()
    flow = outflow(client)
    flow.fail(ConfigError("first"))
    with pytest.raises(ConfigError, match="first"):
        await flow.rest()
    assert not client.started


def test_the_first_event_takes_the_head_with_it_and_waits_for_no_task():
    client = Client()
    flow = outflow(client)
    flow.put_last(b"role")
    flow.put(b"text")
    assert (client.started, client.chunks, flow.writes) == (True, [b"roletext"], 1)


@in_loop
async def test_a_head_that_has_to_wait_is_an_error_where_nothing_may_wait():
    async def send(message):
        await asyncio.sleep(0)

    scope = {"extensions": {LINE_EXTENSION: {"line": Client()}}}
    with pytest.raises(InternalError):
        Reply(scope, send).start_stream_now()


@in_loop
async def test_outflow_ends_when_every_producer_has_closed():
    flow, _, running = begun(producers=2)
    flow.close()
    await asyncio.sleep(0)
    assert not running.done()
    flow.close()
    await running


@in_loop
async def test_event_is_written_where_it_is_put():
    flow, client, running = begun()
    flow.put(b"a")
    flow.put(b"b")
    assert client.chunks == [b"a", b"b"]
    flow.close()
    await running
    assert (flow.events, flow.writes) == (3, 3)


@in_loop
async def test_events_held_for_a_full_connection_leave_in_one_write_and_in_order():
    flow, client, running = begun()
    client.stop_reading()
    flow.put(b"a")
    flow.put(b"b")
    await asyncio.sleep(0)
    client.read_again()
    flow.put(b"c")  # not past those that are held
    flow.close()
    assert await running == b"abc"
    assert (flow.events, flow.writes) == (4, 2)


@in_loop
async def test_what_ends_an_answer_leaves_with_the_end_of_the_response():
    flow, client, running = begun()
    flow.put_last(b"a")
    flow.put_last(b"b")
    flow.close()
    assert await running == b"ab"
    assert client.chunks == []
    assert (flow.events, flow.writes) == (3, 2)


@in_loop
async def test_what_ends_one_of_several_answers_does_not_wait_for_the_others():
    flow, client, running = begun(producers=2)
    flow.put_last(b"a")
    flow.put_last(b"b")
    flow.close()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert client.chunks == [b"ab"]
    flow.put(b"c")
    assert client.chunks == [b"ab", b"c"]
    flow.close()
    assert await running == b""


@in_loop
async def test_outflow_that_nobody_takes_raises_after_its_grace():
    flow = outflow(Client(reads=False), max_events=2, grace_s=0.01)
    flow.put(b"a")
    flow.put(b"b")
    with pytest.raises(ClientTooSlow, match="2 events behind"):
        await flow.rest()


@in_loop
async def test_outflow_that_holds_too_many_bytes_raises_without_grace():
    flow, client, running = begun(max_events=1000, grace_s=1000.0)
    client.stop_reading()
    flow.put(bytes(MAX_HELD_BYTES))
    await asyncio.sleep(0)
    assert not running.done()
    flow.put(b"a")
    with pytest.raises(ClientTooSlow):
        await running


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


@pytest.mark.parametrize("body", [STREAM, WHOLE], ids=["stream", "whole"])
@in_loop
async def test_many_choices_are_begun_a_few_in_each_turn_of_the_loop(tmp_path, body):
    begun: list[int] = []
    turn = 0

    async def noting(request):
        begun.append(turn)
        yield Generated(tokens=(0,), finish=FinishReason.STOP)

    generator = ScriptedGenerator(noting)
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        asked = asyncio.create_task(
            http.post(f"{server.url}{PATH}", content=body.replace(b"{", b'{"n": 30, ', 1))
        )
        while not asked.done():
            turn += 1
            await asyncio.sleep(0)
    assert asked.result().status_code == 200
    assert len(begun) == 30
    assert max(begun.count(one) for one in begun) <= 2 * STARTED_A_TURN
