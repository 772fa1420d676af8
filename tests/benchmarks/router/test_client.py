"""The load's client: what it counts of an answer, however the bytes are cut."""

import asyncio

import pytest

from benchmarks.router.client import Client, Seen, chat_body
from benchmarks.types import BenchFailed

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWER = HEAD + chunk(EVENT) + chunk(EVENT) + chunk(EVENT) + chunk(DONE) + b"0\r\n\r\n"


class Wire(asyncio.Transport):
    """A connection that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def abort(self) -> None:
        self.written = b""


async def answered(*pieces: bytes) -> Seen:
    client = Client()
    client.connection_made(Wire())
    answer = client.ask(chat_body("m", "p", 3))
    for piece in pieces:
        client.data_received(piece)
    async with asyncio.timeout(1):
        return await answer


@pytest.mark.parametrize("size", [1, 2, 5, 7, 50, 1000])
async def test_events_are_counted_the_same_however_the_answer_is_cut(size: int) -> None:
    pieces = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
    assert (await answered(*pieces)).events == 3


async def test_a_pause_after_the_head_is_a_gap_too() -> None:
    seen = await answered(HEAD, chunk(EVENT), ANSWER[len(HEAD) + len(chunk(EVENT)) :])
    assert len(seen.gaps_s) == 2
    assert seen.reads == 2, "the head is no event"


async def test_an_answer_that_is_no_200_fails_with_what_was_said() -> None:
    with pytest.raises(BenchFailed, match="503 Service Unavailable"):
        await answered(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")


async def test_a_connection_that_closes_within_an_answer_fails_it() -> None:
    client = Client()
    client.connection_made(Wire())
    answer = client.ask(chat_body("m", "p", 3))
    client.data_received(HEAD + chunk(EVENT))
    client.connection_lost(None)
    assert not client.alive
    with pytest.raises(BenchFailed, match="it closed the connection"):
        await answer
