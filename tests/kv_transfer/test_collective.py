"""What only the collective transport has: groups that come and go, and waits that must end."""

import asyncio
import logging
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import InternalError, TransferCause, TransferFailed
from core.ids import ShardId
from engine.arena import Arena
from kv_transfer import collective_reader, traffic
from kv_transfer.chunks import Int64s
from kv_transfer.collective import CollectiveTransport
from kv_transfer.collective_group import Gate, Work
from kv_transfer.collective_link import Link, wait
from kv_transfer.loopback import LoopbackHub
from kv_transfer.transport import give_up
from tests.builders import soon, until
from tests.kv_transfer.transport_sides import (
    BLOCK_BYTES,
    LAYOUT,
    Side,
    make_plan,
    owner_processes,
    side,
)

PATIENCE_S = 0.5
LATE_S = 5.0  # a wait that is bounded by PATIENCE_S has ended by then, also on a busy machine
BIG_BLOCKS = (32 << 20) // BLOCK_BYTES
BIG = [(0, 0, 32 << 20)]
ROW = [(BLOCK_BYTES, 2 * BLOCK_BYTES, BLOCK_BYTES)]

HELLO = struct.pack("!4sH48s", b"BtnC", 1, b"")

new_side = partial(side, "collective", LoopbackHub())
hasty_side = partial(new_side, read_timeout_s=PATIENCE_S, connect_timeout_s=PATIENCE_S)


@asynccontextmanager
async def pair(**settings: float) -> AsyncIterator[tuple[Side, Side]]:
    async with new_side(seed=1, **settings) as reader, new_side(seed=2, **settings) as owner:
        await reader.connect(owner)
        yield reader, owner


def address(owner: Side) -> tuple[str, int]:
    host, _, port = owner.transport.memory().metadata.decode().rpartition(":")
    return host, int(port)


def threads(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def all_threads() -> int:
    """Those of C++ too."""
    return len(list(Path("/proc/self/task").iterdir()))


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    started_s = time.monotonic()
    yield
    assert time.monotonic() - started_s < seconds


# -- coming and going ---------------------------------------------------------------------------


async def test_nothing_is_left_of_pairs_that_came_and_went() -> None:
    async with new_side(seed=1) as reader, new_side(seed=2) as owner:
        left: list[tuple[int, int]] = []
        for _ in range(50):
            await reader.connect(owner)
            await reader.read(owner, ROW)
            await soon(reader.transport.disconnect(owner.shard))
            await until(lambda: threads("kv-reader") + threads("kv-owner") == 0, "no thread left")
            left.append((open_files(), all_threads()))
        files, alive = left[2]
        await until(lambda: open_files() <= files, "no file left")
        await until(
            lambda: all_threads() <= alive, "no thread of C++ left"
        )  # they end by themselves


async def test_nothing_is_left_of_transports_that_came_and_went() -> None:
    async def come_and_go() -> None:
        async with pair() as (reader, owner):
            await reader.read(owner, ROW)

    for _ in range(2):
        await come_and_go()
    before = open_files(), all_threads()
    for _ in range(5):
        await come_and_go()
    await until(lambda: (open_files(), all_threads()) == before, "nothing left")


async def test_the_owners_thread_ends_with_its_reader() -> None:
    async with pair() as (reader, owner):
        assert threads("kv-owner") == 1
        await soon(reader.transport.close())
        await until(lambda: threads("kv-owner") == 0, "the owner's thread has ended")
        async with new_side(seed=3) as next_reader:
            await next_reader.connect(owner)
            await next_reader.read(owner, ROW)


async def test_the_process_goes_on_after_its_transport_closed_twice() -> None:
    async with pair() as (reader, _):
        for _ in range(2):
            await soon(reader.transport.close())


async def test_a_closed_transport_neither_connects_nor_reads() -> None:
    async with new_side() as owner, new_side() as reader:
        await reader.transport.close()
        with pytest.raises(TransferFailed, match="stopping"):
            await reader.connect(owner)
        with pytest.raises(TransferFailed, match="not connected"):
            await reader.read(owner, ROW)


async def test_two_connects_at_once_make_one_pair() -> None:
    async with new_side(seed=1) as reader, new_side(seed=2) as owner:
        await soon(asyncio.gather(reader.connect(owner), reader.connect(owner)))
        assert threads("kv-reader") == 1
        await reader.read(owner, ROW)


async def test_a_host_that_is_not_this_machine_is_refused() -> None:
    with pytest.raises(InternalError, match=r"203\.0\.113\.1"):
        CollectiveTransport(Arena(LAYOUT, 1), "203.0.113.1")


# -- owners that do not answer ------------------------------------------------------------------


async def refused_connect(reader: Side, port: int) -> TransferFailed:
    memory = replace(reader.transport.memory(), metadata=f"127.0.0.1:{port}".encode())
    with ends_within(LATE_S), pytest.raises(TransferFailed) as failure:
        await reader.transport.connect(ShardId("x/0"), memory)
    return failure.value


async def test_a_port_nobody_listens_on_gives_no_answer_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    async with new_side() as reader:
        failure = await refused_connect(reader, port)
        assert failure.cause is TransferCause.NO_ANSWER
        assert "refused" in failure.message


async def test_an_owner_that_says_nothing_gives_no_answer_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with hasty_side() as reader:
            failure = await refused_connect(reader, silent.getsockname()[1])
            assert failure.cause is TransferCause.NO_ANSWER
            await until(lambda: threads("kv-reader") == 0, "the reader's thread has ended")


@pytest.mark.parametrize(
    "metadata", [b"", b"nonsense", b"127.0.0.1:", b"\xff:1", b"nowhere.invalid:1"]
)
async def test_metadata_that_is_none_is_refused(metadata: bytes) -> None:
    async with pair() as (reader, owner):
        memory = replace(owner.transport.memory(), metadata=metadata)
        with pytest.raises(TransferFailed):
            await soon(reader.transport.connect(ShardId("x/0"), memory))
        await reader.read(owner, ROW)


async def test_a_connect_given_up_leaves_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with hasty_side() as reader:
            port = silent.getsockname()[1]
            memory = replace(reader.transport.memory(), metadata=f"127.0.0.1:{port}".encode())
            connecting = asyncio.create_task(reader.transport.connect(ShardId("x/0"), memory))
            await until(lambda: threads("kv-reader") == 1, "the reader's thread runs")
            connecting.cancel()
            await asyncio.wait([connecting])
            await reader.transport.disconnect(ShardId("x/0"))
            with ends_within(LATE_S):
                await until(lambda: threads("kv-reader") == 0, "the reader's thread has ended")


# -- readers that do not go on ------------------------------------------------------------------


@pytest.mark.parametrize(
    "first_words",
    [
        pytest.param(b"", id="silent"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: baton\r\n\r\n" + b"x" * 64, id="stranger"),
        pytest.param(struct.pack("!4sH48s", b"BtnC", 99, b""), id="another version"),
        pytest.param(HELLO, id="does not join"),
        pytest.param(HELLO + b"\0\4\xff\xff\xff\xff" + b"x" * 99, id="endless value"),
        pytest.param(HELLO + b"\0\0\0\0\0\0", id="joins with nothing"),
        pytest.param(HELLO + b"\0\1\0\0\0\1k\xff" * 20, id="joins with nonsense"),
    ],
)
@pytest.mark.parametrize("leaves", [True, False])
async def test_a_reader_that_never_comes_in_holds_up_nobody(
    first_words: bytes, leaves: bool
) -> None:
    async with hasty_side(seed=1) as reader, hasty_side(seed=2) as owner:
        stranger = socket.create_connection(address(owner))
        stranger.sendall(first_words)
        if leaves:
            stranger.close()
        await reader.connect(owner)
        await reader.read(owner, ROW)
        await soon(reader.transport.disconnect(owner.shard))
        with ends_within(LATE_S):
            await until(lambda: threads("kv-owner") == 0, "the owner's threads have ended")
        stranger.close()


@asynccontextmanager
async def raw_reader(owner: Side) -> AsyncIterator[Link]:
    """A reader's end without its manners."""
    gate = Gate(owner.arena, "127.0.0.1")
    link = Link(socket.create_connection(address(owner)))
    try:
        await asyncio.to_thread(link.connect, gate, time.monotonic() + LATE_S)
        yield link
    finally:
        link.drop()


async def test_a_reader_that_asks_and_does_not_receive_is_given_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with hasty_side(num_blocks=BIG_BLOCKS) as owner, raw_reader(owner) as link:
        zero, size = np.array([0]), np.array([32 << 20])
        await asyncio.to_thread(link.ask, zero, size, time.monotonic() + LATE_S)
        with ends_within(LATE_S):
            await until(lambda: threads("kv-owner") == 0, "the owner's thread has ended")
    assert "transfer_pair_ended from=127." in caplog.text


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1 << 40), (1 << 62, 1), (-1, 1), (0, -1), ((1 << 63) - 1, (1 << 63) - 1), (0, 0)],
)
async def test_the_owner_refuses_runs_outside_its_arena(offset: int, length: int) -> None:
    async with new_side() as owner, raw_reader(owner) as link:
        ask = partial(link.ask, until_s=time.monotonic() + LATE_S)
        with pytest.raises(RuntimeError, match="past the owner's arena"):
            await asyncio.to_thread(ask, np.array([0, offset]), np.array([1, length]))
        await asyncio.to_thread(ask, np.array([0]), np.array([1]))


async def test_a_read_the_owner_refuses_fails_alone() -> None:
    async with new_side(num_blocks=64, seed=1) as reader, new_side(num_blocks=32) as owner:
        claimed = replace(owner.transport.memory(), nbytes=64 * BLOCK_BYTES)
        await soon(reader.transport.connect(owner.shard, claimed))
        with pytest.raises(TransferFailed, match="past the owner's arena") as failure:
            await reader.read(owner, [(40 * BLOCK_BYTES, 0, BLOCK_BYTES)])
        assert failure.value.cause is TransferCause.READ_FAILED
        await reader.read(owner, ROW)


# -- reads that do not go on --------------------------------------------------------------------


@pytest.mark.processes
async def test_a_hanging_owner_fails_reads_in_time_and_what_it_sends_later_lands_nowhere() -> None:
    async with (
        owner_processes("collective", BIG_BLOCKS, seeds=[2]) as (hanging,),
        new_side(seed=3) as other,
        side(
            "collective", LoopbackHub(), num_blocks=BIG_BLOCKS, seed=1, read_timeout_s=1.0
        ) as reader,
    ):
        transport = reader.transport
        await soon(transport.connect(hanging.shard, hanging.memory))
        await reader.connect(other)
        reads = [transport.start_read(hanging.shard, make_plan(BIG)) for _ in range(4)]
        hanging.stop()
        with ends_within(1.0 + LATE_S):
            results = await asyncio.gather(*reads, return_exceptions=True)
        assert isinstance(results[-1], TransferFailed)
        reader.data[:] = 7
        hanging.go_on()
        with pytest.raises(TransferFailed):
            await soon(transport.start_read(hanging.shard, make_plan(ROW)))
        await reader.read(other, ROW)
        reader.data[2 * BLOCK_BYTES : 3 * BLOCK_BYTES] = 7
        await soon(transport.connect(hanging.shard, hanging.memory))
        assert (reader.data == 7).all()
        await soon(transport.start_read(hanging.shard, make_plan(BIG)))
        assert not (reader.data == 7).all()


async def test_disconnect_in_the_middle_fails_the_reads_and_nothing_lands_after() -> None:
    async with (
        new_side(num_blocks=BIG_BLOCKS, seed=1) as reader,
        new_side(num_blocks=BIG_BLOCKS, seed=2) as owner,
    ):
        await reader.connect(owner)
        reads = [reader.start(owner, BIG) for _ in range(4)]
        await reads[0]
        await soon(reader.transport.disconnect(owner.shard))
        reader.data[:] = 7
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert isinstance(results[-1], TransferFailed)
        await until(lambda: threads("kv-reader") == 0, "the reader's thread has ended")
        assert (reader.data == 7).all()


async def test_a_chunk_that_arrived_before_the_end_is_not_written_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def wait_and_pause(work: Work, until_s: float) -> None:
        wait(work, until_s)
        arrived.set()
        go_on.wait(LATE_S)

    async with pair() as (reader, owner):
        monkeypatch.setattr(collective_reader, "wait", wait_and_pause)
        read = reader.start(owner, ROW)
        await asyncio.to_thread(arrived.wait, LATE_S)
        before = reader.data.copy()
        await soon(reader.transport.disconnect(owner.shard))
        with pytest.raises(TransferFailed, match="disconnected"):
            await soon(read)
        go_on.set()
        await until(lambda: threads("kv-reader") == 0, "the reader's thread has ended")
        assert np.array_equal(reader.data, before)


async def test_a_read_given_up_before_its_turn_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reading, go_on, asked = threading.Event(), threading.Event(), list[int]()
    real_ask = Link.ask

    def slow_ask(link: Link, offsets: Int64s, lengths: Int64s, until_s: float) -> None:
        reading.set()
        go_on.wait(LATE_S)
        asked.append(int(offsets[0]))
        real_ask(link, offsets, lengths, until_s)

    async with pair() as (reader, owner):
        monkeypatch.setattr(Link, "ask", slow_ask)
        begun = reader.start(owner, [(0, 0, BLOCK_BYTES)])
        await until(reading.is_set, "the first is under way")
        given_up, wanted = (reader.start(owner, rows) for rows in (ROW, [(0, 0, BLOCK_BYTES)]))
        for read in (begun, given_up):
            give_up(read)
        go_on.set()
        await soon(begun)
        await soon(wanted)
        with pytest.raises(TransferFailed, match="given up"):
            await soon(given_up)
        assert asked == [0, 0]
        await reader.read(owner, ROW)


async def test_many_bytes_may_take_longer_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    real_send = Link.send

    def slow_send(link: Link, data: torch.Tensor) -> Work:
        time.sleep(PATIENCE_S / 4)
        return real_send(link, data)

    settings = {"num_blocks": BIG_BLOCKS, "read_timeout_s": PATIENCE_S}
    async with pair(**settings) as (reader, owner):
        monkeypatch.setattr(traffic, "_SLOWEST_BYTES_PER_S", BIG[0][2] / LATE_S)
        monkeypatch.setattr(Link, "send", slow_send)
        await reader.read(owner, BIG)
        assert np.array_equal(reader.data, owner.data)


async def test_a_failed_pair_says_why_until_it_is_connected_again() -> None:
    async with new_side(seed=1) as reader, new_side(seed=2) as owner:
        await reader.connect(owner)
        await owner.transport.close()
        for _ in range(2):
            with pytest.raises(TransferFailed, match=str(owner.shard)) as failure:
                await reader.read(owner, ROW)
            assert failure.value.cause is TransferCause.READ_FAILED
        async with new_side(seed=3) as heir:
            memory = heir.transport.memory()
            await soon(reader.transport.connect(owner.shard, memory))
            await soon(reader.transport.start_read(owner.shard, make_plan(ROW)))


async def test_close_does_not_wait_for_an_owner_that_hangs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with new_side() as reader:
            port = silent.getsockname()[1]
            memory = replace(reader.transport.memory(), metadata=f"127.0.0.1:{port}".encode())
            connecting = asyncio.create_task(reader.transport.connect(ShardId("x/0"), memory))
            await until(lambda: threads("kv-reader") == 1, "the reader's thread runs")
            with ends_within(LATE_S):
                await reader.transport.close()
            await asyncio.wait([connecting])
            assert isinstance(connecting.exception(), TransferFailed)
    assert "transfer_threads_stuck" not in caplog.text


# -- the transport itself -----------------------------------------------------------------------


async def test_it_fails_only_when_its_door_breaks() -> None:
    async with pair() as (reader, owner):
        failed = asyncio.create_task(owner.transport.failed())
        await reader.read(owner, ROW)
        await soon(reader.transport.close())
        await asyncio.wait([failed], timeout=0.05)
        assert not failed.done()
        assert isinstance(owner.transport, CollectiveTransport)
        owner.transport._door._listener.shutdown(socket.SHUT_RDWR)  # as no peer could
        assert isinstance(await soon(failed), OSError)


@pytest.mark.parametrize(
    ("mine", "theirs", "group"),
    [
        ("A", "B", "nccl"),
        ("A", "A", "gloo"),
        ("A", "", "gloo"),
        ("", "B", "gloo"),
        ("", "", "gloo"),
    ],
)
def test_nccl_joins_two_gpus_and_gloo_the_rest(mine: str, theirs: str, group: str) -> None:
    gate = Gate(Arena(LAYOUT, 1), "127.0.0.1")
    gate.gpu = mine
    assert gate.backend(theirs) == group


async def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    async with hasty_side(seed=1) as reader:
        async with hasty_side(seed=2) as owner:
            await reader.connect(owner)
            await reader.read(owner, ROW)
        with pytest.raises(TransferFailed):
            await reader.read(owner, ROW)
        with pytest.raises(TransferFailed):
            await reader.connect(owner)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
