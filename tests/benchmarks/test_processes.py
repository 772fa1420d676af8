"""Two children of a bench: what they say, and that none outlives it."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from benchmarks.processes import Pair, Side
from benchmarks.types import BenchFailed
from benchmarks.zygote import Forked, Zygote

pytestmark = pytest.mark.processes

TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Number:
    value: int


async def send_number(side: Side, number: int) -> None:
    side.send(Number(number))


async def double(side: Side, number: int) -> tuple[int, int]:
    """What the owner sent, twice, and the task itself."""
    side.progress("doubling", 1, 2)
    return 2 * (await side.receive(Number)).value, number


async def sleep(side: Side, task: object) -> None:
    await asyncio.sleep(60.0)


async def fail(side: Side, text: str) -> None:
    raise ValueError(text)


async def exit_at_once(side: Side, status: int) -> None:
    print("last words", flush=True)
    os._exit(status)


class Cycle:
    """Something only the collector frees. `alive` counts those in this process."""

    alive = 0

    def __init__(self) -> None:
        self.itself = self
        Cycle.alive += 1

    def __del__(self) -> None:
        Cycle.alive -= 1


async def no_work(side: Side, task: object) -> None:
    pass


async def count_cycles(side: Side, task: object) -> int:
    """Those left by jobs before; leaves one."""
    alive = Cycle.alive
    Cycle()
    return alive


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every process a test forks; none outlives it."""
    pids: list[int] = []
    fork = Zygote.fork

    def note(self: Zygote, *arguments: Any, **named: Any) -> Forked:
        child = fork(self, *arguments, **named)
        pids.append(child.pid)
        return child

    monkeypatch.setattr(Zygote, "fork", note)
    yield pids
    assert pids
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def quiet(text: str, done: int, total: int) -> None:
    """Progress nobody looks at."""


def test_what_a_job_leaves_in_cycles_is_freed_before_the_next() -> None:
    with Zygote() as zygote, Pair(zygote) as pair:
        left = [
            pair.run(no_work, count_cycles, None, progress=quiet, timeout_s=TIMEOUT_S)
            for _ in range(3)
        ]
    assert left == [0, 0, 0]


def test_the_sides_speak_to_each_other_and_the_reader_answers_every_job() -> None:
    steps: list[tuple[str, int, int]] = []
    with Zygote() as zygote, Pair(zygote) as pair:
        for number in (3, 4):
            answer = pair.run(
                send_number,
                double,
                number,
                progress=lambda *step: steps.append(step),
                timeout_s=TIMEOUT_S,
            )
            assert answer == (2 * number, number)
    assert steps == [("doubling", 1, 2)] * 2


def test_a_side_that_fails_or_dies_ends_the_run_with_its_words() -> None:
    with (
        Zygote() as zygote,
        Pair(zygote) as pair,
        pytest.raises(BenchFailed, match="owner process failed: ValueError: no"),
    ):
        pair.run(fail, sleep, "no", progress=quiet, timeout_s=TIMEOUT_S)
    with (
        Zygote() as zygote,
        Pair(zygote) as pair,
        pytest.raises(BenchFailed, match=r"reader process died\n  last words"),
    ):
        pair.run(sleep, exit_at_once, 1, progress=quiet, timeout_s=TIMEOUT_S)


def test_work_that_does_not_end_is_given_up_and_ended() -> None:
    with (
        Zygote() as zygote,
        Pair(zygote) as pair,
        pytest.raises(BenchFailed, match=r"did not end within 0\.2 s"),
    ):
        pair.run(sleep, sleep, 60.0, progress=quiet, timeout_s=0.2)
