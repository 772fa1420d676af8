"""The reader's end of a pair of the `collective` transport."""

import asyncio
import logging
import queue
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from core.errors import TransferCause, TransferFailed
from core.ids import ShardId
from kv_transfer.chunks import Runs
from kv_transfer.collective_group import Work
from kv_transfer.collective_link import (
    LINK_ERRORS,
    Home,
    Link,
    Refused,
    describe,
    inside,
    tell,
    wait,
)
from kv_transfer.messages import Memory
from kv_transfer.plan import ReadPlan
from kv_transfer.traffic import patience_s
from kv_transfer.transport import QueuedRead, ReadStats

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Reading:
    plan: ReadPlan
    future: QueuedRead


class Pair:
    """This worker as a reader of one owner. Its thread executes the reads one after another.

    `failure` is set once, under the lock: from then on nothing is written into the arena.
    """

    def __init__(
        self, home: Home, peer: ShardId, memory: Memory, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._home = home
        self._peer = peer
        self._memory = memory
        self._loop = loop
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._reads: queue.Queue[_Reading | None] = queue.Queue()
        self._pending: set[asyncio.Future[ReadStats]] = set()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.failure: TransferFailed | None = None
        self.thread = threading.Thread(target=self._run, name="kv-reader", daemon=True)

    # -- event loop

    def start(self) -> None:
        self.thread.start()

    def read(self, plan: ReadPlan) -> "asyncio.Future[ReadStats]":
        """Starts when the reads before it have ended."""
        future = QueuedRead(loop=self._loop)
        failure = self.failure or self._wrong(plan)
        if failure is not None:
            _fail(future, failure)
        elif plan.nbytes == 0:
            future.set_result(ReadStats(nbytes=0, descriptors=plan.descriptors, seconds=0.0))
        else:
            self._pending.add(future)
            future.add_done_callback(self._pending.discard)
            self._reads.put(_Reading(plan, future))
        return future

    def _wrong(self, plan: ReadPlan) -> TransferFailed | None:
        rows = plan.rows.astype(np.int64)
        for side, column, nbytes in (
            ("reads past the peer's", 0, self._memory.nbytes),
            ("writes past this worker's", 1, self._home.arena.nbytes),
        ):
            if not inside(rows[:, column], rows[:, 2], nbytes):
                return TransferFailed(f"the plan {side} arena", cause=TransferCause.READ_FAILED)
        return None

    # -- any thread

    def end(self, reason: str, cause: TransferCause) -> None:
        """Every pending read fails now, and every later one; may repeat."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = TransferFailed(f"KV read from {self._peer}: {reason}", cause=cause)
            link = self._link
        if link is not None:
            link.close()
        self._reads.put(None)
        tell(self._loop, self._fail_pending)

    def _fail_pending(self) -> None:
        assert self.failure is not None
        if not self.ready.done():
            self.ready.set_exception(_again(self.failure))
            self.ready.exception()  # it may be that nobody waits for it
        for future in list(self._pending):
            _fail(future, self.failure)

    # -- the pair's thread

    def _run(self) -> None:
        cause = TransferCause.NO_ANSWER
        try:
            with self._home.gate.stream():
                link = self._connect()
                cause = TransferCause.READ_FAILED
                tell(self._loop, self._say_ready)
                while (reading := self._reads.get()) is not None:
                    self._serve(link, reading)
        except LINK_ERRORS as error:
            self.end(describe(error), cause)
        except Exception as error:  # the root of the thread
            log.exception("transfer_bug")
            self.end(describe(error), cause)
        finally:
            if self._link is not None:
                self._link.drop()

    def _connect(self) -> Link:
        until_s = time.monotonic() + self._home.connect_timeout_s
        host, _, port = self._memory.metadata.decode().rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout=self._home.connect_timeout_s)
        link = Link(sock)
        with self._lock:
            self._link = link
            if self.failure is not None:
                link.close()
        link.connect(self._home.gate, until_s)
        return link

    def _say_ready(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)

    def _serve(self, link: Link, reading: _Reading) -> None:
        """One read. Only what is refused fails alone; any other error ends the pair."""
        try:
            if reading.future.given_up:
                raise Refused("it was given up before its turn came")
            stats = self._read(link, reading.plan)
        except Refused as refusal:
            text = f"KV read from {self._peer} refused: {refusal}"
            failure = TransferFailed(text, cause=TransferCause.READ_FAILED)
            tell(self._loop, partial(_fail, reading.future, failure))
        else:
            tell(self._loop, partial(_succeed, reading.future, stats))

    def _read(self, link: Link, plan: ReadPlan) -> ReadStats:
        started_s = time.monotonic()
        until_s = started_s + patience_s(self._home.read_timeout_s, plan.nbytes)
        rows = plan.rows[plan.rows[:, 2] > 0].astype(np.int64)
        link.ask(rows[:, 0], rows[:, 2], until_s)
        runs = Runs(rows[:, 1], rows[:, 2], link.chunk_bytes)
        posted: deque[tuple[torch.Tensor, Work]] = deque()

        def post(number: int) -> None:
            if number < runs.chunks:
                buffer = link.staging(number, runs.size(number))
                posted.append((buffer, link.receive(buffer)))

        post(0)
        post(1)
        for number, pieces in enumerate(runs):
            buffer, work = posted.popleft()
            wait(work, until_s)
            with self._lock:
                if self.failure is not None:
                    raise EOFError("the pair has ended")
                self._home.arena.write(pieces, buffer)
            post(number + 2)
        return ReadStats(
            nbytes=plan.nbytes,
            descriptors=plan.descriptors,
            seconds=time.monotonic() - started_s,
        )


def _again(failure: TransferFailed) -> TransferFailed:
    """One error object per waiter: each raise would add to the traceback of a shared one."""
    return TransferFailed(failure.message, cause=failure.cause)


def _succeed(future: "asyncio.Future[ReadStats]", stats: ReadStats) -> None:
    if not future.done():
        future.set_result(stats)


def _fail(future: "asyncio.Future[ReadStats]", failure: TransferFailed) -> None:
    if not future.done():
        future.set_exception(_again(failure))
