"""Processes of a search: all its results, and none left when it is given up."""

import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import active_children
from operator import add
from pathlib import Path

import psutil
import pytest

from simulator.processes import deaf_to_interrupts, run_all


def test_every_task_is_answered_once() -> None:
    assert sorted(run_all(add, [(i, 10) for i in range(5)], 2)) == [10, 11, 12, 13, 14]


def test_giving_up_ends_the_processes_and_drops_what_waits() -> None:
    answers = run_all(time.sleep, [(0.0,), *[(60.0,)] * 4], 2)
    assert next(answers) is None
    assert active_children()
    answers.close()
    assert not active_children()


def test_they_end_with_the_process_that_asked(tmp_path: Path) -> None:
    (tmp_path / "asks.py").write_text(
        "import time\n"
        "from simulator.processes import run_all\n"
        "if __name__ == '__main__':\n"
        "    answers = run_all(time.sleep, [(0.0,), *[(60.0,)] * 4], 2)\n"
        "    next(answers)\n"
        "    print('asked', flush=True)\n"
        "    next(answers)\n"
    )
    asks = subprocess.Popen(
        [sys.executable, str(tmp_path / "asks.py")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert asks.stdout is not None
    assert asks.stdout.readline() == b"asked\n"
    workers = [
        child
        for child in psutil.Process(asks.pid).children()
        if "resource_tracker" not in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    asks.terminate()
    asks.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10.0)
    assert not alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_another_thread_takes_is_raised_when_the_block_ends(
    number: signal.Signals,
) -> None:
    """In the middle of it, it could be lost which process just started."""
    begin, whole = threading.Event(), False
    before = signal.signal(number, signal.default_int_handler)

    def take() -> None:
        begin.wait()
        signal.raise_signal(number)

    other = threading.Thread(target=take)  # before the block, whose threads are deaf as well
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt), deaf_to_interrupts():
            begin.set()
            other.join()
            whole = True
        assert whole
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
