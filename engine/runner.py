"""The engine loop: plan a step on the event loop, run it on the engine thread, take its results.

Sequences, pool and plan belong to the event loop; the engine thread sees one batch at a time. What
runs when is the scheduler's to say (scheduler.py); here are the loop, the clock and the listeners.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from core.clock import Clock
from core.errors import BatonError, DeadlineExceeded, InternalError
from core.fit import PrefillCost
from core.sampling import FinishReason
from core.step import StepBudget, StepWork
from engine.longest import LongestStep
from engine.pool import BlockPool
from engine.scheduler import RunnerLoad, Scheduler
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


class Runner:
    """`run` is the loop's only task. Everything else is called from the event loop."""

    def __init__(
        self,
        engine: Engine,
        pool: BlockPool,
        clock: Clock,
        *,
        step_tokens: int,
        chunk_tokens: int | None = None,
        max_batch: int,
        step_timeout_s: float,
        on_step_end: Callable[[], None],
        budget: StepBudget | None = None,
    ) -> None:
        self._engine = engine
        self._pool = pool
        self._clock = clock
        self._step_timeout_s = step_timeout_s
        self._on_step_end = on_step_end
        self._block_size = engine.info.layout.block_size
        self._scheduler = Scheduler[Sequence](
            pool,
            block_size=self._block_size,
            step_tokens=step_tokens,
            chunk_tokens=chunk_tokens,
            max_batch=max_batch,
            on_admitted=lambda sequence: self._listeners[id(sequence)].on_blocks(sequence),
            budget=budget,
        )
        self._listeners: dict[int, SequenceListener] = {}
        self._wake = asyncio.Event()
        self.prefill_cost = PrefillCost(min(chunk_tokens or step_tokens, step_tokens))
        """What prefill takes here; learned from the steps that do nothing else."""
        self.longest_step = LongestStep()
        self.steps = 0
        self._step_began_s: float | None = None

    @property
    def step_age_s(self) -> float:
        """How long the step in flight has run; 0 while there is none."""
        return 0.0 if self._step_began_s is None else self._clock.now_s() - self._step_began_s

    @property
    def preemptions(self) -> int:
        """Sequences that gave their blocks back to others, so far."""
        return self._scheduler.preemptions

    # -- submit and cancel ----------------------------------------------------------------------

    def submit(self, sequence: Sequence, listener: SequenceListener) -> None:
        """Queue a sequence whose context must (in part) be computed here."""
        self._listeners[id(sequence)] = listener
        self._scheduler.enqueue(sequence)
        self._wake.set()

    def submit_ready(self, sequence: Sequence, listener: SequenceListener) -> None:
        """Start a sequence whose blocks are in place; the runner takes over their references."""
        self._listeners[id(sequence)] = listener
        self._scheduler.join(sequence, self._clock.now_s())
        self._wake.set()

    def remove(self, sequence: Sequence) -> None:
        """Stop a sequence without telling its listener; does nothing when it is done."""
        if sequence.done:
            return
        self._finish(sequence)
        self._wake.set()

    def hold(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch, between two of its steps; it keeps its blocks
        and its deadline, and is not preempted. Call `resume` or `remove` soon.
        """
        self._scheduler.hold(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a held sequence go on where it stopped."""
        if sequence.state is SequenceState.HELD:
            self._scheduler.resume(sequence)
            self._wake.set()

    def work_of(self, sequence: Sequence) -> StepWork:
        """Of all prompts, in the steps since its first one began."""
        return self._scheduler.work.since(sequence.work_before)

    def wake(self) -> None:
        """Blocks were freed elsewhere: a waiting sequence may start now."""
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Nothing waits or runs, and no step still holds blocks of what was removed."""
        return self._scheduler.idle

    @property
    def running(self) -> int:
        """Sequences that have their blocks."""
        return len(self._scheduler.running) + len(self._scheduler.held)

    @property
    def awaited_blocks(self) -> int:
        """Free blocks that are the first waiting sequence's, as it has waited for a while."""
        return self._scheduler.awaited_blocks(self._clock.now_s())

    def load(self) -> RunnerLoad:
        """True load, for reports and admission."""
        return self._scheduler.load()

    # -- the loop -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Step until cancelled. An exception of the engine itself ends the loop, and the worker."""
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        try:
            while True:
                self._expire()
                batch = self._scheduler.next_batch(self._clock.now_s())
                if not batch:
                    self._on_step_end()
                    await self._rest()
                    continue
                steps = [sequence.make_step(count) for sequence, count in batch]
                began_s = self._step_began_s = self._clock.now_s()
                step = loop.run_in_executor(thread, self._engine.step, steps)
                try:
                    results = await self._in_time(step)
                finally:
                    self._scheduler.step_ended()
                    self._step_began_s = None
                took_s = self._clock.now_s() - began_s
                self.longest_step.add(took_s)
                chunks = _chunks_of(batch)
                self._scheduler.did(chunks)
                self._learn(batch, chunks, took_s)
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

    def _learn(
        self,
        batch: list[tuple[Sequence, int]],
        chunks: list[tuple[int, int]],
        seconds: float,
    ) -> None:
        """A step of prefill and decode mixed says nothing about either part, but about others."""
        if all(s.computed < s.context_tokens for s, _ in batch):
            self.prefill_cost.add([(s.computed, s.computed + n) for s, n in batch], seconds)
            return
        now_s, budget = self._clock.now_s(), self._scheduler.budget
        if not budget.learns(now_s):
            return
        contexts = [s.known_tokens for s, _ in batch if s.pending_tokens == 1]
        if chunks and contexts:
            budget.saw(chunks, len(contexts), sum(contexts), seconds, now_s)

    async def _rest(self) -> None:
        self._wake.clear()
        timeout_s = _IDLE_SWEEP_S if self._scheduler.waiting or self._scheduler.held else None
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return

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
            self._finish(sequence)

    def _expire(self) -> None:
        now_s, scheduler = self._clock.now_s(), self._scheduler
        for sequence in [*scheduler.waiting, *scheduler.running, *scheduler.held]:
            if sequence.deadline_at_s <= now_s:
                self._fail(sequence, DeadlineExceeded("the request's deadline passed"))

    def _fail(self, sequence: Sequence, error: BatonError) -> None:
        listener = self._listeners[id(sequence)]
        listener.on_failed(sequence, error)
        self.remove(sequence)

    def _finish(self, sequence: Sequence) -> None:
        del self._listeners[id(sequence)]
        self._scheduler.finish(sequence)


def _chunks_of(batch: list[tuple[Sequence, int]]) -> list[tuple[int, int]]:
    """Of prompts, before the step's results are taken."""
    return [(s.computed, s.computed + n) for s, n in batch if s.pending_tokens > 1]
