"""A pool of processes that Ctrl-C ends at once."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context, resource_tracker
from typing import TypeVar

from core.parent import end_with_parent

T = TypeVar("T")


def run_all(call: Callable[..., T], tasks: Sequence[Sequence[object]], count: int) -> Iterator[T]:
    """`call(*task)` of each task in `count` processes, in the order they end.

    Whatever ends the iteration early, an interrupt or the end of this process alone too, ends the
    processes: an executor left to itself works off all that is queued.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(
        count,
        mp_context=get_context("spawn"),
        initializer=end_with_parent,
        initargs=(os.getpid(),),
    )
    try:
        with deaf_to_interrupts():
            futures = [pool.submit(call, *task) for task in tasks]
        for done in as_completed(futures):
            yield done.result()
    except BaseException:
        for child in set(active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def deaf_to_interrupts() -> Iterator[None]:
    """In the main thread: processes started in the block never hear an interrupt of the whole
    group, as a terminal sends it. It is this process's to answer, with one that came meanwhile when
    the block ends.

    Children inherit the mask. It is this thread's alone, and one that another thread takes would be
    raised here nevertheless: amid the start of a process, which then nobody knows of. So would be
    SIGTERM, which is put off alike, and which the processes do hear: it ends them.
    """
    resource_tracker.ensure_running()  # as it starts with the first process it unblocks SIGINT
    came = list[int]()

    def note(number: int, frame: object) -> None:
        came.append(number)

    answers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, answer in answers.items():
            signal.signal(number, answer)
        if came:
            signal.raise_signal(came[0])
