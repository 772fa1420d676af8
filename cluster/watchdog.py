"""When a process hangs: it is stopped, its event loop is stuck, a driver never returns.

A worker or router that serves is asked every few seconds whether its event loop turns, and hangs
when it has left enough questions in a row unanswered. Each question has a deadline of its own,
measured from when it was asked; wall time since the last answer says nothing. So a controller that
itself stood still, alone or with its machine, kills nobody when it goes on: it slept through the
deadline of one question per process, and one overslept by far counts for nothing. A late answer is
an answer.

An engine in a long step is not meant: it computes beside the event loop, and router/hung.py and
engine.step_timeout_s are for it.
"""

import asyncio
import math
from collections.abc import Callable

from core.clock import Clock

_ASK_EVERY_S = 5.0
_FEWEST = 4
_OVERSLEPT = 2.0


class Silence:
    """The rule for one process. `ask`, a wait of `answer_s`, `hangs`; and again."""

    def __init__(self, timeout_s: float, clock: Clock) -> None:
        """It hangs when `timeout_s`, above 0, is full of unanswered questions: four at least."""
        self.answer_s = min(_ASK_EVERY_S, timeout_s / _FEWEST)
        self._limit = math.ceil(timeout_s / self.answer_s)
        self._clock = clock
        self._asked_s = clock.now_s()
        self.missed = 0
        """Questions in a row without an answer."""
        self.silent_s = 0.0
        """For how long they were waited for."""

    @property
    def reason(self) -> str:
        """Why it was killed, for people."""
        return (
            f"it hung: nothing came within {self.silent_s:.0f} s (hang_timeout_s), so it was killed"
        )

    def ask(self) -> None:
        """A question goes out."""
        self._asked_s = self._clock.now_s()

    def hangs(self, *, answered: bool) -> bool:
        """Its deadline has passed; `answered`: meanwhile one came, to it or to an older one."""
        waited_s = self._clock.now_s() - self._asked_s
        if answered:
            self.missed, self.silent_s = 0, 0.0
        elif waited_s <= _OVERSLEPT * self.answer_s:
            self.missed += 1
            self.silent_s += waited_s
        return self.missed >= self._limit


async def until_it_hangs(ask: Callable[[], "asyncio.Future[int]"], silence: Silence) -> None:
    """Ask until it hangs by `silence`. Answers count up what the event loop has answered: one that
    brings nothing new tells that the process lives and its loop does not.
    """
    newest = counted = -1

    def hear(answer: "asyncio.Future[int]") -> None:
        nonlocal newest
        if not answer.cancelled() and answer.exception() is None:
            newest = max(newest, answer.result())

    while True:
        silence.ask()
        ask().add_done_callback(hear)
        await asyncio.sleep(silence.answer_s)
        if silence.hangs(answered=newest > counted):
            return
        counted = newest
