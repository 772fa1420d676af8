"""When a process is taken to hang, by the rule alone and by questions on a real event loop."""

import asyncio

import pytest

from cluster.watchdog import Silence, until_it_hangs
from cluster.worker_spec import Pulse
from core.clock import FakeClock, SystemClock


class Asked:
    """A process that is asked by the rule, under a clock of the test's."""

    def __init__(self, timeout_s: float) -> None:
        self.clock = FakeClock(1000.0)
        self.silence = Silence(timeout_s, self.clock)

    def question(self, *, answered: bool = False, overslept_s: float = 0.0) -> bool:
        """One question and its deadline; whether the process hangs by then."""
        self.silence.ask()
        self.clock.advance(self.silence.answer_s + overslept_s)
        return self.silence.hangs(answered=answered)


def test_a_process_hangs_once_its_time_is_full_of_unanswered_questions() -> None:
    asked = Asked(60.0)
    assert [asked.question() for _ in range(12)] == [False] * 11 + [True]
    assert (asked.silence.missed, asked.silence.silent_s) == (12, 60.0)


def test_one_answer_begins_the_row_anew() -> None:
    asked = Asked(60.0)
    assert not any(asked.question() for _ in range(11))
    assert not asked.question(answered=True)
    assert not any(asked.question() for _ in range(11))
    assert asked.question()


@pytest.mark.parametrize("pause_s", [20.0, 3600.0, 1e6])
def test_an_asker_that_stood_still_itself_kills_nobody(pause_s: float) -> None:
    asked = Asked(60.0)
    assert not asked.question(overslept_s=pause_s)
    assert not any(asked.question(overslept_s=pause_s) for _ in range(100))
    assert not any(asked.question() for _ in range(11))  # each still has its own deadline
    assert asked.question()


def test_time_between_two_questions_counts_for_nothing() -> None:
    asked = Asked(60.0)
    assert not any(asked.question() for _ in range(11))
    asked.clock.advance(3600.0)
    assert not asked.question(answered=True)


@pytest.mark.parametrize("timeout_s", [1.0, 3.0, 7.0, 20.0, 61.0, 600.0])
def test_a_short_time_has_four_questions_and_a_long_one_is_never_cut(timeout_s: float) -> None:
    asked = Asked(timeout_s)
    asks = 1
    while not asked.question():
        asks += 1
    assert asks >= 4
    assert timeout_s <= asked.silence.silent_s <= timeout_s + asked.silence.answer_s


async def test_an_event_loop_that_stops_turning_hangs_though_its_process_answers() -> None:
    turns: list[bool] = [True]
    asks = 0
    pulse = Pulse()
    pulse.of(lambda beat: beat() if turns[0] else None)

    def ask() -> asyncio.Future[int]:
        nonlocal asks
        asks += 1
        turns[0] = asks < 20
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(pulse.ask())
        return answer

    async with asyncio.timeout(60):
        await until_it_hangs(ask, Silence(0.2, SystemClock()))
    assert asks >= 23  # 19 turns, and four questions without one


async def test_a_process_whose_answers_all_come_late_lives() -> None:
    pulse = Pulse()
    pulse.of(lambda beat: beat())
    late: list[asyncio.Future[int]] = []

    def ask() -> asyncio.Future[int]:
        late.append(asyncio.get_running_loop().create_future())
        if len(late) > 3:
            late[-3].set_result(pulse.ask())  # after two deadlines
        return late[-1]

    watching = asyncio.create_task(until_it_hangs(ask, Silence(0.2, SystemClock())))
    async with asyncio.timeout(60):
        while len(late) < 30:
            await asyncio.sleep(0.01)
    assert not watching.done()
    watching.cancel()
    await asyncio.wait([watching])


async def test_a_question_that_fails_is_no_answer() -> None:
    def ask() -> asyncio.Future[int]:
        answer = asyncio.get_running_loop().create_future()
        answer.set_exception(ConnectionError())
        return answer

    async with asyncio.timeout(60):
        await until_it_hangs(ask, Silence(0.2, SystemClock()))


def test_a_host_that_does_not_serve_yet_has_a_pulse_of_none() -> None:
    pulse = Pulse()
    assert [pulse.ask(), pulse.ask()] == [0, 0]
