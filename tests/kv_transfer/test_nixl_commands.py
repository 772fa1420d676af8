"""What the transfer thread hears, and that it sleeps meanwhile."""

import asyncio
import queue
import threading
from collections.abc import Iterator

import pytest

from kv_transfer.nixl_commands import Command, Commands

TIMEOUT_S = 10.0
SOON_S = 0.01


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def command(loop: asyncio.AbstractEventLoop) -> Command:
    return Command(lambda: None, loop.create_future())


def test_commands_come_in_order_and_then_none(loop: asyncio.AbstractEventLoop) -> None:
    commands = Commands()
    told = [command(loop) for _ in range(5)]
    for one in told:
        commands.put(one)
    assert [commands.get(TIMEOUT_S) for _ in told] == told
    for _ in range(3):  # a ring is left over from the first of them
        with pytest.raises(queue.Empty):
            commands.get(SOON_S)


def test_a_ring_left_over_ends_no_wait(loop: asyncio.AbstractEventLoop) -> None:
    commands = Commands()
    commands.put(command(loop))
    commands.get()
    late = command(loop)
    timer = threading.Timer(SOON_S, commands.put, [late])
    timer.start()
    assert commands.get(TIMEOUT_S) is late
    timer.join()


def test_nothing_is_lost_between_threads_and_none_says_stop(
    loop: asyncio.AbstractEventLoop,
) -> None:
    commands, told = Commands(), [command(loop) for _ in range(20_000)]
    heard: list[Command] = []

    def hear() -> None:
        while (one := commands.get(TIMEOUT_S)) is not None:
            heard.append(one)

    thread = threading.Thread(target=hear)
    thread.start()
    for one in told:
        commands.put(one)
    commands.put(None)
    thread.join(TIMEOUT_S)
    assert heard == told


def test_what_nobody_will_run_is_given_back(loop: asyncio.AbstractEventLoop) -> None:
    commands, one = Commands(), command(loop)
    commands.put(one)
    commands.put(None)
    assert commands.take_left() == [one]
    assert commands.take_left() == []
