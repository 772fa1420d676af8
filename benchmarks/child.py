"""One process of a Pair: takes jobs from the bench until that closes its end."""

import gc
import sys
import traceback
from multiprocessing.connection import Connection
from textwrap import indent

import torch
import uvloop

from benchmarks.processes import ChildSide, Done, Failed, Job


def main() -> None:
    """The arguments are two descriptors: to the bench, and to the other process."""
    torch.set_num_threads(1)  # else a fill or a memcpy takes both cores
    bench, other = (Connection(int(number)) for number in sys.argv[1:3])
    side = ChildSide(bench, other)
    while True:
        try:
            job = bench.recv()
        except EOFError:
            return
        done = _do(job, side)
        gc.collect()  # an arena in a cycle would stay, and the next one cost the kernel new pages
        bench.send(done)


def _do(job: Job, side: ChildSide) -> Done | Failed:
    try:
        return Done(uvloop.run(job.work(side, job.task)))
    except Exception as error:  # noqa: BLE001 - the root of a job; the bench hears of it
        return Failed(
            f"{type(error).__name__}: {error}", indent(traceback.format_exc().rstrip(), "  ")
        )
