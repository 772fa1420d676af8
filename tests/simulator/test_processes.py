"""Processes of a search: all its results, and none left when it is given up."""

import time
from multiprocessing import active_children
from operator import add

from simulator.processes import run_all


def test_every_task_is_answered_once() -> None:
    assert sorted(run_all(add, [(i, 10) for i in range(5)], 2)) == [10, 11, 12, 13, 14]


def test_giving_up_ends_the_processes_and_drops_what_waits() -> None:
    answers = run_all(time.sleep, [(0.0,), *[(60.0,)] * 4], 2)
    assert next(answers) is None
    assert active_children()
    answers.close()
    assert not active_children()
