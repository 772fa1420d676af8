"""The stop signal between an actor's threads."""

import threading

from cluster.worker_spec import StopSignal


def test_a_stop_wakes_whoever_waits_once() -> None:
    signal, calls = StopSignal(), []
    with signal.wakes(lambda: calls.append(1)):
        signal.request()
        signal.request()
    assert calls == [1]
    assert signal.requested


def test_a_stop_that_came_first_wakes_at_once() -> None:
    signal, woken = StopSignal(), threading.Event()
    signal.request()
    with signal.wakes(woken.set):
        assert woken.is_set()


def test_nobody_is_woken_after_the_block() -> None:
    signal, calls = StopSignal(), []
    with signal.wakes(lambda: calls.append(1)):
        pass
    signal.request()
    assert calls == []
