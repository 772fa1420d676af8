"""The engine loop: plan a step on the event loop, run it on the engine thread, take its results.

Sequences, pool and plan belong to the event loop; the engine thread sees one batch at a time. While
a step is in flight nothing it reads or writes is freed: a sequence removed meanwhile gives its
blocks back when the step has ended.

    submit -> waiting --admit (all blocks of its context, or it stays)--> running -> done
                 ^------------ preempted: blocks back, KV recomputed later ----'| ^
                                                                          hold  v | resume
                                                                              held -> removed
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from core.clock import Clock
from core.errors import BatonError, DeadlineExceeded, InternalError
from core.fit import PrefillCost
from core.ids import BlockId
from core.sampling import FinishReason
from engine.planner import plan_step
from engine.pool import BlockPool
from engine.sequence import Sequence, SequenceState
from engine.types import Engine, Sampled

log = logging.getLogger(__name__)

_IDLE_SWEEP_S = 0.25
_STEP_GRACE_S = 5.0


class SequenceListener(Protocol):
    """Whoever submitted a sequence hears of it, always on the event loop.

    `on_blocks` after each step that made KV of its context, before `on_token`; its blocks are
    published and final. After `on_token` with a finish, or `on_failed`, the sequence is done; its
    running references are released right after the call returns. `on_token` may hold its sequence.
    """

    def on_blocks(self, sequence: Sequence) -> None: ...

    def on_token(
        self, sequence: Sequence, sampled: Sampled, finish: FinishReason | None
    ) -> None: ...

    def on_failed(self, sequence: Sequence, error: BatonError) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLoad:
    """What the loop has to do."""

    queued_tokens: int
    waiting: int
    running: int
    context_tokens: int


class Runner:
    """`run` is the loop's only task. Everything else is called from the event loop."""

    def __init__(
        self,
        engine: Engine,
        pool: BlockPool,
        clock: Clock,
        *,
        step_tokens: int,
        max_batch: int,
        step_timeout_s: float,
        on_step_end: Callable[[], None],
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._clock = clock
        self._step_tokens = step_tokens
        self._max_batch = max_batch
        self._step_timeout_s = step_timeout_s
        self._on_step_end = on_step_end
        self._block_size = engine.info.layout.block_size
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._held: list[Sequence] = []
        self._listeners: dict[int, SequenceListener] = {}
        self._in_flight: set[int] = set()
        self._late_release: list[list[BlockId]] = []
        self._wake = asyncio.Event()
        self.prefill_cost = PrefillCost(step_tokens)
        """What prefill takes here; learned from the steps that do nothing else."""
        self.steps = 0
        self.preemptions = 0

    # -- submit and cancel ----------------------------------------------------------------------

    def submit(self, sequence: Sequence, listener: SequenceListener) -> None:
        """Queue a sequence whose context must (in part) be computed here."""
        self._listeners[id(sequence)] = listener
        sequence.cached_tokens = len(self._lookup(sequence)) * self._block_size
        self._waiting.append(sequence)
        self._wake.set()

    def submit_ready(self, sequence: Sequence, listener: SequenceListener) -> None:
        """Start a sequence whose blocks are in place; the runner takes over their references."""
        self._listeners[id(sequence)] = listener
        sequence.state = SequenceState.RUNNING
        sequence.started_at_s = self._clock.now_s()
        self._running.append(sequence)
        self._wake.set()

    def remove(self, sequence: Sequence) -> None:
        """Stop a sequence without telling its listener; does nothing when it is done."""
        if sequence.done:
            return
        self._queue_of(sequence).remove(sequence)
        self._finish(sequence)
        self._wake.set()

    def hold(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch, between two of its steps; it keeps its blocks
        and its deadline, and is not preempted. Call `resume` or `remove` soon.
        """
        if sequence.state is not SequenceState.RUNNING or id(sequence) in self._in_flight:
            raise InternalError(f"sequence {sequence.sequence_id} cannot be held now")
        self._running.remove(sequence)
        sequence.state = SequenceState.HELD
        self._held.append(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a held sequence go on where it stopped."""
        if sequence.state is SequenceState.HELD:
            self._held.remove(sequence)
            sequence.state = SequenceState.RUNNING
            self._running.append(sequence)
            self._wake.set()

    def wake(self) -> None:
        """Blocks were freed elsewhere: a waiting sequence may start now."""
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Nothing waits or runs, and no step still holds blocks of what was removed."""
        open_ = self._waiting or self._running or self._held
        return not (open_ or self._in_flight or self._late_release)

    def load(self) -> RunnerLoad:
        """True load, for reports and admission."""
        queued = sum(s.pending_tokens - s.cached_tokens for s in self._waiting)
        queued += sum(s.pending_tokens for s in self._running if s.pending_tokens > 1)
        return RunnerLoad(
            queued_tokens=queued,
            waiting=len(self._waiting),
            running=len(self._running) + len(self._held),
            context_tokens=sum(len(s.tokens) for s in [*self._running, *self._held]),
        )

    # -- the loop -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Step until cancelled. An exception of the engine itself ends the loop, and the worker."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        try:
            while True:
                self._expire()
                batch = self._next_batch()
                if not batch:
                    self._on_step_end()
                    await self._rest()
                    continue
                steps = [sequence.make_step(count) for sequence, count in batch]
                self._in_flight = {id(sequence) for sequence, _ in batch}
                began_s = self._clock.now_s()
                step = loop.run_in_executor(thread, self._engine.step, steps)
                try:
                    results = await self._in_time(step)
                finally:
                    self._in_flight = set()
                    self._release_late()
                self._learn(batch, self._clock.now_s() - began_s)
                self.steps += 1
                for (sequence, count), result in zip(batch, results, strict=True):
                    self._apply(sequence, count, result)
                self._on_step_end()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    async def _in_time(
        self, step: "asyncio.Future[list[Sampled | BatonError | None]]"
    ) -> list[Sampled | BatonError | None]:
        """The step's results. A step that does not end condemns the engine: its thread is stuck.

        Cancelled, it still waits for the step, whose blocks must not be freed under it.
        """
        try:
            async with asyncio.timeout(self._step_timeout_s):
                return await asyncio.shield(step)
        except TimeoutError:
            raise InternalError(
                f"an engine step did not end within {self._step_timeout_s:g} s"
            ) from None
        finally:
            if not step.done():
                await asyncio.wait([step], timeout=_STEP_GRACE_S)

    def _learn(self, batch: list[tuple[Sequence, int]], seconds: float) -> None:
        """A step of prefill and decode mixed says nothing about either part: it is left out."""
        if all(s.computed < s.context_tokens for s, _ in batch):
            self.prefill_cost.add([(s.computed, s.computed + n) for s, n in batch], seconds)

    async def _rest(self) -> None:
        self._wake.clear()
        timeout_s = _IDLE_SWEEP_S if self._waiting or self._held else None
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return

    def _next_batch(self) -> list[tuple[Sequence, int]]:
        while self._waiting and self._admit(self._waiting[0]):
            pass
        feed = plan_step(
            [s.pending_tokens for s in self._running], self._step_tokens, self._max_batch
        )
        batch: list[tuple[Sequence, int]] = []
        for sequence, count in zip(list(self._running), feed, strict=True):
            running = sequence.state is SequenceState.RUNNING
            if count and running and self._grow(sequence, sequence.computed + count):
                batch.append((sequence, count))
        batch = [(s, count) for s, count in batch if s.state is SequenceState.RUNNING]
        if len(self._running) > self._max_batch:
            self._running = self._running[self._max_batch :] + self._running[: self._max_batch]
        return batch

    def _admit(self, sequence: Sequence) -> bool:
        """Take all blocks of the known tokens, reusing cached ones, or leave it waiting."""
        cached = self._lookup(sequence)
        missing = self._engine.info.layout.num_blocks(len(sequence.tokens)) - len(cached)
        if missing > self._pool.available_beside(cached):
            return False
        self._pool.acquire(cached)
        fresh = self._pool.allocate(missing)
        if fresh is None:
            raise InternalError("allocation failed although the blocks were counted")
        sequence.blocks = [*cached, *fresh]
        sequence.published = len(cached)
        sequence.computed = len(cached) * self._block_size
        if sequence.started_at_s is None:
            sequence.cached_tokens = sequence.computed
            sequence.started_at_s = self._clock.now_s()
        sequence.state = SequenceState.RUNNING
        self._waiting.remove(sequence)
        self._running.append(sequence)
        if sequence.computed:
            self._listeners[id(sequence)].on_blocks(sequence)
        return True

    def _lookup(self, sequence: Sequence) -> list[BlockId]:
        """Cached blocks of its known tokens, but for the last one, which must be fed."""
        full = (len(sequence.tokens) - 1) // self._block_size
        return self._pool.lookup(sequence.block_hashes(full, self._block_size))

    def _grow(self, sequence: Sequence, end: int) -> bool:
        """Blocks up to position `end`; preempts the youngest when there are none left."""
        missing = self._engine.info.layout.num_blocks(end) - len(sequence.blocks)
        while missing > 0:
            fresh = self._pool.allocate(missing)
            if fresh is not None:
                sequence.blocks.extend(fresh)
                return True
            youngest = max(self._running, key=lambda s: s.arrived_at_s)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Give its blocks back and compute its KV again later; the text stays the same."""
        self.preemptions += 1
        if sequence.on_preempted is not None:
            sequence.on_preempted()  # ends a lease, which would keep the blocks
        self._running.remove(sequence)
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.cached_tokens = 0
        sequence.published = sequence.computed = 0
        sequence.state = SequenceState.WAITING
        self._waiting.insert(0, sequence)

    # -- results --------------------------------------------------------------------------------

    def _apply(self, sequence: Sequence, count: int, result: Sampled | BatonError | None) -> None:
        if sequence.done:
            return
        listener = self._listeners[id(sequence)]
        if isinstance(result, BatonError):
            log.error("step_failed sequence=%s reason=%s", sequence.sequence_id, result.message)
            listener.on_failed(sequence, result)  # ends a lease, which would keep them published
            self._pool.unpublish(sequence.blocks)
            self.remove(sequence)
            return
        sequence.computed += count
        sequence.publish(self._pool, self._block_size)
        if sequence.computed <= sequence.context_tokens:
            listener.on_blocks(sequence)
        if result is None:
            return
        finish = sequence.append(result)
        listener.on_token(sequence, result, finish)
        if finish is not None and not sequence.done:
            self._running.remove(sequence)
            self._finish(sequence)

    def _expire(self) -> None:
        now_s = self._clock.now_s()
        for sequence in [*self._waiting, *self._running, *self._held]:
            if sequence.deadline_at_s <= now_s:
                self._fail(sequence, DeadlineExceeded("the request's deadline passed"))

    def _fail(self, sequence: Sequence, error: BatonError) -> None:
        listener = self._listeners[id(sequence)]
        listener.on_failed(sequence, error)
        self.remove(sequence)

    def _queue_of(self, sequence: Sequence) -> list[Sequence]:
        match sequence.state:
            case SequenceState.WAITING:
                return self._waiting
            case SequenceState.HELD:
                return self._held
            case _:
                return self._running

    def _finish(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.DONE
        del self._listeners[id(sequence)]
        blocks, sequence.blocks = sequence.blocks, []
        if id(sequence) in self._in_flight:
            self._late_release.append(blocks)
        else:
            self._pool.release(blocks)

    def _release_late(self) -> None:
        for blocks in self._late_release:
            self._pool.release(blocks)
        self._late_release.clear()
