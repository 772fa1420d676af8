"""The connection of one request, as uvicorn and the streaming path write to it."""

import asyncio
from types import SimpleNamespace

from http_builders import in_loop

from router.http_line import ChunkedLine


class Connection:
    """A transport and its flow control that note what is done with them."""

    def __init__(self):
        self.writes = []
        self.closed = False
        self.write_paused = False
        self.reading = False

    def write(self, data):
        self.writes.append(data)

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    def resume_reading(self):
        self.reading = True


def line_of(connection):
    loop = asyncio.get_running_loop()
    protocol = SimpleNamespace(transport=connection, flow=connection, loop=loop, attended=set())
    return ChunkedLine(protocol), protocol.attended


@in_loop
async def test_a_head_leaves_with_the_events_of_its_turn():
    connection = Connection()
    line, _ = line_of(connection)
    line.write(b"head")
    line.put(b"event")
    line.put(b"next")
    await asyncio.sleep(0)
    assert connection.writes == [b"head5\r\nevent\r\n", b"4\r\nnext\r\n"]


@in_loop
async def test_a_head_leaves_with_the_body_of_its_turn():
    connection = Connection()
    line, _ = line_of(connection)
    line.write(b"head")
    line.write(b"body")
    assert connection.writes == [b"headbody"]


@in_loop
async def test_a_head_alone_does_not_wait_longer_than_its_turn():
    connection = Connection()
    line, _ = line_of(connection)
    line.write(b"head")
    assert connection.writes == []
    await asyncio.sleep(0)
    assert connection.writes == [b"head"]


@in_loop
async def test_a_head_leaves_before_the_connection_closes():
    connection = Connection()
    line, _ = line_of(connection)
    line.write(b"head")
    line.close()
    assert connection.writes == [b"head"]
    assert connection.closed


@in_loop
async def test_nothing_is_written_to_a_connection_that_closes():
    connection = Connection()
    line, _ = line_of(connection)
    line.write(b"head")
    connection.closed = True
    line.put(b"event")
    await asyncio.sleep(0)
    assert connection.writes == []


@in_loop
async def test_only_who_attends_hears_of_the_end_and_the_connection_is_read():
    connection, heard = Connection(), []
    line, attended = line_of(connection)
    line.attend(lambda: heard.append("end"))
    assert connection.reading
    assert attended == {line}
    line.lost()
    line.attend(None)
    line.lost()
    assert heard == ["end"]
    assert not attended
