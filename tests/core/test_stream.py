"""Messages over TCP: whole, in order, and a clear end whatever the other end sends."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import ConfigError
from core.stream import (
    MessageStream,
    StreamBroken,
    accepting,
    address_of,
    dial,
    listen,
)
from tests.builders import WAIT_S, soon


class Raw(bytes):
    """A message that is its own bytes."""

    def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
        return bytes(self)


@asynccontextmanager
async def echo() -> AsyncIterator[str]:
    """The address of a door that says back what it hears."""

    async def serve(stream: MessageStream[Raw]) -> None:
        while (message := await stream.read()) is not None:
            stream.send(message)

    listener = listen("127.0.0.1", 0)
    async with accepting(listener, Raw, serve):
        yield address_of(listener)


Run = Callable[[Coroutine[None, None, None]], None]

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
"""Workers and router run on the second; they differ in when a connection is heard of."""


@LOOPS
@given(messages=st.lists(st.binary(max_size=70_000), max_size=8))
@settings(max_examples=30, deadline=None)
def test_messages_arrive_whole_and_in_order(run: Run, messages: list[bytes]) -> None:
    async def exchange() -> None:
        async with echo() as address, dial(address, Raw) as stream:
            for message in messages:
                stream.send(Raw(message))
            assert [await soon(stream.read()) for _ in messages] == messages

    run(exchange())


@LOOPS
@given(
    messages=st.lists(st.binary(max_size=70_000), min_size=1, max_size=8), first=st.integers(1, 8)
)
@settings(max_examples=20, deadline=None)
def test_a_function_takes_messages_until_it_leaves_one_to_the_task(
    run: Run, messages: list[bytes], first: int
) -> None:
    taken: list[bytes] = []

    def take(message: Raw) -> bool:
        taken.append(message)
        return len(taken) % first != 0

    async def exchange() -> None:
        async with echo() as address, dial(address, Raw) as stream:
            for message in messages:
                stream.send(Raw(message))
            for left in range(first - 1, len(messages), first):
                assert await soon(stream.deliver(take)) == messages[left]
            assert taken == messages[: len(messages) // first * first]

    run(exchange())


async def test_what_a_taker_raises_is_raised_where_messages_are_delivered() -> None:
    def take(_: Raw) -> bool:
        raise LookupError("no such lease")

    async with echo() as address, dial(address, Raw) as stream:
        delivering = asyncio.create_task(stream.deliver(take))
        stream.send(Raw(b"x"))
        with pytest.raises(LookupError, match="no such lease"):
            await soon(delivering)


async def test_a_taker_ends_with_its_stream() -> None:
    async with echo() as address:
        async with dial(address, Raw) as stream:
            delivering = asyncio.create_task(stream.deliver(lambda _: True))
            stream.send(Raw(b"x"))
            await asyncio.sleep(0)
        assert await soon(delivering) is None


@pytest.mark.parametrize("turns", range(5))
def test_a_door_can_be_left_while_somebody_dials(turns: int) -> None:
    async def scene() -> None:
        async with asyncio.timeout(WAIT_S), echo() as address, dial(address, Raw) as stream:
            stream.send(Raw(b"x"))
            assert await stream.read() == b"x"
            host, port = address.split(":")
            late = socket.create_connection((host, int(port)))
            for _ in range(turns):
                await asyncio.sleep(0)
        late.close()
        await asyncio.sleep(0.01)  # what was aborted is closed in the loop's next turns

    uvloop.run(scene())  # asyncio's own accept of Python 3.11 fails in such a moment


async def heard_from(sent: bytes) -> "StreamBroken | bytes | None":
    """What a reader makes of these bytes, after which the other end closes."""

    async def say(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        writer.close()

    server = await asyncio.start_server(say, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        async with dial(f"{host}:{port}", Raw) as stream:
            try:
                return await soon(stream.read())  # type: ignore[no-any-return]
            except StreamBroken as broken:
                return broken


async def test_an_end_between_messages_is_no_error() -> None:
    assert await heard_from(b"") is None


@pytest.mark.parametrize("sent", [b"\0\0", struct.pack(">I", 5) + b"abc", struct.pack(">I", 5)])
async def test_an_end_within_a_message_breaks_the_stream(sent: bytes) -> None:
    assert "within a message" in str(await heard_from(sent))


async def test_a_length_nobody_sends_is_refused_before_it_is_awaited() -> None:
    assert "speaks something else" in str(await heard_from(b"GET / HTTP/1.1\r\n\r\n"))


async def test_nobody_there_is_said_with_the_address() -> None:
    listener = listen("127.0.0.1", 0)
    address = address_of(listener)
    listener.close()
    with pytest.raises(StreamBroken, match=address):
        async with dial(address, Raw):
            pass


async def test_leaving_the_door_ends_its_streams() -> None:
    async with echo() as address:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(struct.pack(">I", 1) + b"x")
        assert await soon(reader.readexactly(5)) == struct.pack(">I", 1) + b"x"
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await soon(reader.readexactly(1))
    writer.close()


async def test_a_port_in_use_is_named() -> None:
    listener = listen("127.0.0.1", 0)
    with listener, pytest.raises(ConfigError, match="cannot listen on"):
        listen("127.0.0.1", listener.getsockname()[1])


async def test_another_end_that_does_not_read_is_given_up() -> None:
    listener = listen("127.0.0.1", 0)  # the kernel accepts; nobody reads
    with listener:
        async with dial(address_of(listener), Raw) as stream:
            for _ in range(64):
                stream.send(Raw(bytes(1024 * 1024)))
            with pytest.raises(StreamBroken, match="does not read"):
                await soon(stream.read())


async def test_a_message_that_no_end_would_read_is_not_sent_and_named() -> None:
    async with echo() as address, dial(address, Raw) as stream:
        stream.send(Raw(bytes(17 * 1024 * 1024)))
        with pytest.raises(StreamBroken, match=r"a message of 17825792 bytes; 16777216 may"):
            await soon(stream.read())


async def test_no_message_waits_for_the_acknowledgement_of_another() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


class Noted:
    """A transport that notes every write."""

    def __init__(self) -> None:
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.writes.append(data)

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> None:
        return None

    def close(self) -> None:
        self.closed = True

    abort = close


def noted() -> tuple[Noted, MessageStream[Raw]]:
    transport, stream = Noted(), MessageStream(Raw)
    stream.connection_made(transport)  # type: ignore[arg-type]
    return transport, stream


async def test_messages_of_one_turn_leave_in_one_write() -> None:
    transport, stream = noted()
    for message in (b"a", b"", b"bc"):
        stream.send(Raw(message))
    assert transport.writes == []
    await asyncio.sleep(0)
    assert transport.writes == [b"\0\0\0\1a\0\0\0\0\0\0\0\2bc"]


@pytest.mark.parametrize("end", [MessageStream.close, MessageStream.abort])
async def test_what_was_sent_before_an_end_leaves(
    end: Callable[[MessageStream[Raw]], None],
) -> None:
    transport, stream = noted()
    stream.send(Raw(b"last"))
    end(stream)
    assert transport.writes == [b"\0\0\0\4last"]
    await asyncio.sleep(0)
    assert len(transport.writes) == 1


async def test_much_of_one_turn_is_not_held() -> None:
    transport, stream = noted()
    stream.send(Raw(bytes(100_000)))
    assert len(transport.writes) == 1


async def test_messages_that_came_together_are_read_one_by_one() -> None:
    _, stream = noted()
    stream.data_received(b"\0\0\0\1a\0\0\0\2b")
    stream.data_received(b"c\0\0")
    assert [await stream.read(), await stream.read()] == [b"a", b"bc"]
    stream.data_received(b"\0\0")
    assert await stream.read() == b""
