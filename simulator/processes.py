"""A pool of processes that Ctrl-C ends at once."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, get_context
from typing import TypeVar

T = TypeVar("T")


def run_all(call: Callable[..., T], tasks: Sequence[Sequence[object]], count: int) -> Iterator[T]:
    """`call(*task)` of each task in `count` processes, in the order they end.

    Whatever ends the iteration early, an interrupt of this process alone too, ends the processes:
    an executor left to itself works off all that is queued. An interrupt of the whole group, as a
    terminal sends it, is this process's to answer; the others are started with it blocked.
    """
    others = set(active_children())
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(call, *task) for task in tasks]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for done in as_completed(futures):
            yield done.result()
    except BaseException:
        for child in set(active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
