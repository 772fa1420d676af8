"""Any bytes on a stream: whole messages, an error of the tree or a clean end; little memory kept.

Three parsers stand behind the frames: what a worker hears of routers, a router of workers, and two
workers of each other.
"""

import contextlib
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from core.stream import MessageStream, StreamBroken
from kv_transfer.codec import UnknownMessage, from_owner_from_wire, from_reader_from_wire
from router.codec import from_router, from_worker
from tests.builders import NEWER_FIELD, NEWER_MESSAGE, QUICK, soon
from wire import peer_pb2, worker_pb2

Decode = Callable[[Any], object]

KINDS: dict[str, tuple[type[Message], Decode]] = {
    "router": (worker_pb2.ToWorker, from_router),
    "worker": (worker_pb2.ToRouter, from_worker),
    "reader": (peer_pb2.FromReader, from_reader_from_wire),
    "owner": (peer_pb2.FromOwner, from_owner_from_wire),
}
EACH = pytest.mark.parametrize("said_by", KINDS)

PAYLOADS = st.binary(max_size=60)


@st.composite
def nested_fields(draw: st.DrawFn) -> bytes:
    """Bytes that protobuf takes for fields within fields, with numbers that are in use."""
    data = draw(PAYLOADS)
    for _ in range(draw(st.integers(0, 3))):
        number = draw(st.integers(1, 15))
        if draw(st.booleans()):
            data = bytes([number << 3 | 2, len(data) % 128]) + data
        else:
            data = bytes([number << 3, draw(st.integers(0, 127))]) + data
    return data


MESSAGES = PAYLOADS | nested_fields()


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


async def read_all(data: bytes, said_by: str) -> None:
    """To the end; a message that is not known is skipped, as a door does."""
    kind, decode = KINDS[said_by]
    stream: MessageStream[Message] = MessageStream(kind.FromString)
    stream.data_received(data)
    stream.eof_received()
    while (raw := await stream.read()) is not None:
        with contextlib.suppress(UnknownMessage):
            decode(raw)


async def end_of(data: bytes, said_by: str) -> str:
    """How reading ended; anything but an end or the stream's own error fails the test."""
    try:
        await soon(read_all(data, said_by))
    except StreamBroken as broken:
        return str(broken)
    return ""


@EACH
@QUICK
@given(data=st.binary(max_size=200))
async def test_any_bytes_end_cleanly(said_by: str, data: bytes) -> None:
    await end_of(data, said_by)


@EACH
@QUICK
@given(bodies=st.lists(MESSAGES, max_size=4))
async def test_any_body_in_a_whole_frame_ends_cleanly(said_by: str, bodies: list[bytes]) -> None:
    await end_of(b"".join(map(framed, bodies)), said_by)


@EACH
@QUICK
@given(body=MESSAGES, cut=st.integers(1, 200))
async def test_a_cut_within_a_message_is_an_error(said_by: str, body: bytes, cut: int) -> None:
    data = framed(body)
    ended = await end_of(data[: -min(cut, len(data) - 1)], said_by)
    assert ended == "it ended within a message"


@EACH
@QUICK
@given(body=MESSAGES)
async def test_fields_and_messages_not_known_are_skipped(said_by: str, body: bytes) -> None:
    """A message made of whatever parses, with a field of a newer peer, reads as without it."""
    kind, decode = KINDS[said_by]
    try:
        message = kind.FromString(body)
        known = decode(message)
    except (UnknownMessage, DecodeError):
        known = None
    if known is not None:
        newer = message.SerializeToString() + NEWER_FIELD
        assert decode(kind.FromString(newer)) == known
    await end_of(framed(NEWER_MESSAGE) + framed(body), said_by)


@pytest.mark.parametrize("length", [2**24 + 1, 2**31, 2**32 - 1])
async def test_a_length_that_is_too_large_is_refused_before_any_of_it_is_kept(length: int) -> None:
    tracemalloc.start()
    try:
        ended = await end_of(struct.pack(">I", length) + bytes(1000), "router")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ended == f"a message of {length} bytes: it speaks something else"
    assert peak_bytes < 2**20


async def test_a_length_that_is_never_filled_keeps_what_came_and_no_more() -> None:
    tracemalloc.start()
    try:
        ended = await end_of(struct.pack(">I", 2**24) + bytes(1000), "router")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ended == "it ended within a message"
    assert peak_bytes < 2**20
