"""A worker under the virtual clock: the production scheduler, with steps that take model time.

    idle --work--> step in flight --its end--> next step ... --nothing left--> idle

Steps that only decode are the same step again and again until a sequence ends, blocks run out or
somebody comes, so they are one event (`_Run.steps`), timed by the model's closed form. What changes
a batch costs O(log n) of its size n. Where the choice is not plain (more sequences than
`max_batch`, or too few blocks), the scheduler plans each step over the true sequences, which then
stay in `_fresh` from step to step; with `stepwise` it plans every step, which tests compare.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Literal

from core.errors import InternalError
from core.ids import BlockHash, BlockId, WorkerId
from core.messages import KvRemoved, KvStored, LoadReport
from core.step import StepBudget, StepWork
from decode_worker.headroom import (
    Held,
    PastLengths,
    limit_headroom_blocks,
    predicted_headroom_blocks,
)
from decode_worker.policy import pull_headroom_blocks
from engine.latency.base import LatencyModel, StepShape
from engine.planner import share_step
from engine.pool import BlockPool
from engine.scheduler import Scheduler
from engine.sequence import SequenceState
from simulator.events import Events
from simulator.sequence import SimSequence

_KNOWN = attrgetter("known_tokens")
_MOST_STEPS = 1 << 20
_IDLE_SWEEP_S = 0.25

Headroom = Literal["running", "limit", "peak"]
"""What a pull leaves free: as production's do, or one of decode_worker.headroom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What one worker is. `kv_blocks` of `block_size` tokens; `gpus` it occupies."""

    latency: LatencyModel
    kv_blocks: int
    block_size: int
    step_tokens: int = 512
    chunk_tokens: int | None = None
    """Of one prompt in a step; unset: as many."""
    max_batch: int = 256
    max_running: int | None = None
    kv_bytes_per_token: int = 131_072
    nic_bytes_per_s: float = 50e9
    gpus: int = 1
    device: str = ""
    headroom: Headroom = "running"


@dataclass(slots=True)
class _Run:
    """Equal steps in flight. `batch` is what the scheduler planned, where it did."""

    began_s: float
    steps: int
    sequences: int
    chunks: list[tuple[SimSequence, int]] = field(default_factory=list)
    batch: list[tuple[SimSequence, int]] | None = None
    shape: StepShape | None = None
    """Of `batch`."""
    ends_s: float = 0.0


class SimWorker:
    """One life of one worker. `step_s`: see core.step.StepBudget."""

    def __init__(
        self,
        worker_id: WorkerId,
        spec: WorkerSpec,
        events: Events,
        *,
        on_kv: Callable[[Sequence[KvStored | KvRemoved]], None] = lambda events: None,
        on_space: Callable[[], None] = lambda: None,
        step_s: float | None = None,
        stepwise: bool = False,
    ) -> None:
        self.worker_id = worker_id
        self.spec = spec
        self.pool = BlockPool(spec.kv_blocks)
        self.scheduler = Scheduler[SimSequence](
            self.pool,
            block_size=spec.block_size,
            step_tokens=spec.step_tokens,
            chunk_tokens=spec.chunk_tokens,
            max_batch=spec.max_batch,
            on_admitted=lambda sequence: sequence.leg.computed(sequence),
            max_running=spec.max_running,
            budget=StepBudget(step_s),
        )
        self._busy_s = 0.0
        self._pulls = self._pulling_tokens = self._fetching_tokens = 0
        self._past = PastLengths()
        self.receiving: list[SimSequence] = []
        """Those that have their blocks, and not yet the KV."""
        self._events = events
        self._size = spec.block_size
        self._on_kv = on_kv
        self._on_space = on_space
        self._stepwise = stepwise
        self._run: _Run | None = None
        self._settling = False
        self._dead = False
        self._steps = 0
        self._decodes = 0
        self._context_tokens = 0
        """What the decoding sequences attend to in the step that comes."""
        self._prompts: list[SimSequence] = []
        self._fresh: list[SimSequence] = []
        """Running, and neither in a decode run nor among the prompts yet."""
        self._ends: list[tuple[int, int, SimSequence]] = []
        self._growth: list[tuple[int, int, SimSequence]] = []
        self._order = 0
        self._cancelled = False
        self._after_step: list[Callable[[], None]] = []
        self._queued_tokens = 0
        self._report: LoadReport | None = None
        self._report_s = -1.0
        self._grows = False
        """Whether what a report says changes within the run in flight."""

    # -- work that comes and goes ---------------------------------------------------------------

    def compute(self, sequence: SimSequence) -> None:
        """Its context is computed here, then it goes on."""
        self.scheduler.enqueue(sequence)
        sequence.queued_tokens = sequence.pending_tokens - sequence.cached_tokens
        self._queued_tokens += sequence.queued_tokens
        self.look()

    def join(self, sequence: SimSequence) -> None:
        """Its blocks are in place."""
        if sequence in self.receiving:
            self.receiving.remove(sequence)
        self.scheduler.join(sequence, self._events.now_s())
        self._fresh.append(sequence)
        self.look()

    def cancel(self, sequence: SimSequence) -> None:
        """It ends with the step in flight, and its leg hears nothing more."""
        if sequence.state is not SequenceState.DONE:
            sequence.cancelled = self._cancelled = True
            self.look()

    def after_step(self, call: Callable[[], None]) -> None:
        """Once, between the step in flight and the next."""
        self._after_step.append(call)
        self.look()

    def known_now(self, sequence: SimSequence) -> int:
        """Tokens of a sequence here, those of the steps that have ended."""
        if sequence.joined < 0:
            return sequence.known_tokens
        done = 0 if self._run is None else self._done_steps(self._run)
        return sequence.known_tokens + self._steps + done - sequence.joined

    def hold(self, sequence: SimSequence) -> None:
        """Between two steps: it keeps its blocks, and does not go on; see engine.runner.Runner."""
        self.bring_up(sequence)
        if sequence in self._fresh:
            self._fresh.remove(sequence)
        else:
            self._leave_decodes(sequence)
        self.scheduler.hold(sequence)

    def resume(self, sequence: SimSequence) -> None:
        """A held one goes on; others are left alone."""
        if sequence.state is SequenceState.HELD:
            self.scheduler.resume(sequence)
            self._fresh.append(sequence)
            self.look()

    def remove(self, sequence: SimSequence) -> None:
        """A held one is gone, and gives its blocks back."""
        self.scheduler.finish(sequence)
        self.look()

    def look(self) -> None:
        """Something has changed: a run of steps ends with the step in flight, an idle worker begins
        one.
        """
        self._report = None
        if self._settling or self._dead:
            return
        run = self._run
        if run is None:
            self._begin()
        elif run.steps > 1:
            steps = self._done_steps(run) + 1
            if steps < run.steps:
                run.steps = steps
                self._end_later(run)

    def die(self) -> list[SimSequence]:
        """Nothing happens here any more; answers what it ran, counts true at this moment."""
        if self._run is not None and self._run.batch is None and not self._run.chunks:
            self._count(self._done_steps(self._run))
        lost = [*self.scheduler.waiting, *self.scheduler.running, *self.scheduler.held]
        for sequence in lost:
            self.bring_up(sequence)
            sequence.joined = sequence.turn = -1
        self._dead, self._run = True, None
        return lost

    def reserve(
        self, hashes: Sequence[BlockHash], num_blocks: int, coming: SimSequence | None = None
    ) -> tuple[list[BlockId], list[BlockId]] | None:
        """Cached blocks and fresh ones to receive the rest of `num_blocks`, as kv_transfer's reader
        takes them: all, beside the headroom of those that are here, or nothing. `coming` is the
        sequence they are for, if it will run here.
        """
        run, pool, done = self._run, self.pool, 0
        if run is not None and run.batch is None and run.steps > 1:
            done = self._done_steps(run)
            self._grow(self._steps + done)
        cached = pool.lookup(hashes)
        missing = num_blocks - len(cached)
        left = pool.available_beside(cached) - missing
        if left < 0 or left < self._headroom(coming, done):
            return None
        pool.acquire(cached)
        fresh = pool.reserve(missing)
        if fresh is None:
            raise InternalError("reserving failed although the blocks were counted")
        self._report = None
        if coming is not None:
            self.receiving.append(coming)
        if run is not None and pool.available < self._decodes * (run.steps // self._size + 1):
            self.look()
        return cached, fresh

    def _headroom(self, coming: SimSequence | None, done: int) -> int:
        """`done` steps of the run in flight have ended."""
        scheduler, spec = self.scheduler, self.spec
        running, past = scheduler.running, self._past.ordered
        awaited = scheduler.awaited_blocks(self._events.now_s())
        least = pull_headroom_blocks(len(running), awaited)
        if coming is None or spec.headroom == "running":
            return least
        here = chain(running, scheduler.waiting, self.receiving, (coming,))
        held = (_held(one, self._steps + done) for one in here)
        if spec.headroom == "limit":
            return limit_headroom_blocks(held, self._size)
        return predicted_headroom_blocks(
            held, past, self._size, least=least, num_blocks=spec.kv_blocks
        )

    def pulling(self, sequences: int, tokens: int) -> None:
        """So many more hand-offs of so many tokens are on their way here, or fewer."""
        self._pulls += sequences
        self._pulling_tokens += tokens
        self._report = None

    def fetching(self, prompts: int, tokens: int) -> None:
        """So many more prompts wait for a prefix, of which so many tokens are to be computed then,
        or fewer.
        """
        self._pulls += prompts
        self._fetching_tokens += tokens
        self._report = None

    def work_of(self, sequence: SimSequence) -> StepWork:
        """As engine.runner.Runner.work_of."""
        return self.scheduler.work.since(sequence.work_before)

    def tell_kv(self) -> None:
        """Whoever follows this worker's cache hears what has changed."""
        events = self.pool.take_events()
        if events:
            self._on_kv(events)

    # -- load -----------------------------------------------------------------------------------

    @property
    def busy_s(self) -> float:
        """Seconds of steps so far."""
        run = self._run
        return self._busy_s + (0.0 if run is None else self._events.now_s() - run.began_s)

    def load(self, last_submit: int = 0) -> LoadReport:
        """As cluster.worker reports it. Within a run of steps its progress is interpolated."""
        report = self._report
        is_fresh = not self._grows or self._report_s == self._events.now_s()
        if report is None or last_submit or not is_fresh:
            self._report_s = self._events.now_s()
            report = self._report = self._load(self._report_s, last_submit)
        return report

    def _load(self, now_s: float, last_submit: int) -> LoadReport:
        run, grown = self._run, 0
        self._grows = run is not None and run.steps > 1
        decoding, decoding_tokens = self._decoding()
        if run is not None and run.steps > 1 and run.ends_s > run.began_s:
            share = (now_s - run.began_s) / (run.ends_s - run.began_s)
            grown = int(share * run.steps) * run.sequences
        context = self._running_context() + grown + self._pulling_tokens
        context += sum(map(_KNOWN, self.scheduler.held))
        return LoadReport(
            last_submit=last_submit,
            queued_tokens=self._queued_tokens + self._fetching_tokens,
            waiting=len(self.scheduler.waiting) + self._pulls,
            running=len(self.scheduler.running) + len(self.scheduler.held),
            context_tokens=context,
            decoding=decoding,
            decoding_tokens=decoding_tokens + grown,
            free_blocks=max(0, self.pool.available - grown // self._size),
            total_blocks=self.pool.num_blocks,
        )

    def _running_context(self) -> int:
        if self._run is not None and self._run.batch is not None:
            registered, rest = 0, self.scheduler.running
        else:
            registered, rest = self._context_tokens, [*self._prompts, *self._fresh]
        known: int = sum(map(_KNOWN, rest))
        return registered + known

    def _decoding(self) -> tuple[int, int]:
        """Sequences that decode, and their context."""
        if self._run is not None and self._run.batch is not None:
            count, tokens, rest = 0, 0, self.scheduler.running
        else:
            count, tokens, rest = self._decodes, self._context_tokens, self._fresh
        known = [s.known_tokens for s in rest if s.pending_tokens == 1]
        return count + len(known), tokens + sum(known)

    # -- a step begins --------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._cancelled:
            self._drop_cancelled()
        self._admit()
        if not self.scheduler.running:
            self._run = None
            self._on_space()  # what was given back meanwhile has woken nobody
            return
        run = None
        if not self._stepwise and len(self.scheduler.running) <= self.spec.max_batch:
            self._sort_fresh()
            run = self._plan()
        if run is None:
            run = self._plan_by_scheduler()
        self._run, self._report = run, None
        if run is not None:
            self._end_later(run)
        else:
            self._events.at(self._events.now_s() + _IDLE_SWEEP_S, SimWorker.look, self)

    def _end_later(self, run: _Run) -> None:
        if run.batch is None and not run.chunks:
            seconds = self.spec.latency.decode_run_s(run.sequences, self._context_tokens, run.steps)
        else:
            seconds = self.spec.latency.step_s(self._shape(run))
        run.ends_s = run.began_s + seconds
        self._events.at(run.ends_s, self._end, run)

    def _admit(self) -> None:
        """Those that wait and fit begin: a prompt with its first chunk, a decode at once."""
        scheduler = self.scheduler
        if not scheduler.waiting:
            return
        before, now_s = len(scheduler.running), self._events.now_s()
        scheduler.admit(now_s)
        for sequence in scheduler.running[before:]:
            self._queued_tokens += _queued(sequence) - sequence.queued_tokens
            self._fresh.append(sequence)
            if sequence.pending_tokens == 1 and sequence.started_at_s is None:
                scheduler.began(sequence, now_s)

    def _sort_fresh(self) -> None:
        """All that run are decodes, or prompts in order."""
        for sequence in self._fresh:
            if sequence.pending_tokens > 1:
                self._prompts.append(sequence)
            else:
                self._decode(sequence)
        self._fresh.clear()

    def _decode(self, sequence: SimSequence) -> None:
        """It takes part in every step from now on."""
        self._order += 1
        sequence.joined, sequence.turn = self._steps, self._order
        self._decodes += 1
        self._context_tokens += sequence.known_tokens
        first = sequence.known_tokens == sequence.context_tokens
        until = self._steps + (1 if first else sequence.outputs_left)
        heapq.heappush(self._ends, (until, self._order, sequence))
        room = len(sequence.blocks) * self._size - sequence.computed
        heapq.heappush(self._growth, (self._steps + room, self._order, sequence))

    def _plan(self) -> _Run | None:
        """The next run, where all decodes go on and their blocks suffice; else None."""
        spec, now_s, decodes = self.spec, self._events.now_s(), self._decodes
        step_tokens, prompts = spec.step_tokens, self._prompts
        if prompts:
            step_tokens = self.scheduler.step_tokens(decodes, self._context_tokens, prompts[0])
        pending = (sequence.known_tokens - sequence.computed for sequence in prompts)
        fed, chunks = share_step(decodes, pending, step_tokens, spec.max_batch, spec.chunk_tokens)
        if fed < decodes or not self._grow(self._steps):
            return None
        if prompts:
            planned = list(zip(prompts, chunks, strict=False))  # those behind get nothing
            fed_prompts = self._first_chunks(planned, now_s)
            return _Run(now_s, 1, self._decodes, fed_prompts)
        while self._ends[0][2].turn != self._ends[0][1]:
            heapq.heappop(self._ends)
        steps = min(_MOST_STEPS, self._ends[0][0] - self._steps)
        return _Run(now_s, min(steps, self._steps_with_room(steps)), decodes)

    def _first_chunks(
        self, planned: list[tuple[SimSequence, int]], now_s: float
    ) -> list[tuple[SimSequence, int]]:
        """The chunks as they are fed: a prompt that begins reuses what was cached meanwhile, and
        one of which only a token is left by that decodes.
        """
        fed: list[tuple[SimSequence, int]] = []
        coming: set[BlockHash] = set()
        for sequence, most in planned:
            count = most
            if sequence.started_at_s is None:
                before = sequence.pending_tokens
                self.scheduler.reuse(sequence)
                self._queued_tokens -= before - _queued(sequence)
                count = min(most, sequence.pending_tokens)
                if self.scheduler.begins_later(sequence, count, coming):
                    continue
                self.scheduler.began(sequence, now_s)
                if sequence.pending_tokens == 1:
                    self._prompts.remove(sequence)
                    self._decode(sequence)
                    continue
            fed.append((sequence, count))
            if count > 1:
                coming.update(self.scheduler.blocks_of(sequence, count))
        return fed

    def _steps_with_room(self, steps: int) -> int:
        """Of `steps`, those that surely do not run out of blocks; at least 1, which was grown."""
        size, free, decodes = self._size, self.pool.available, self._decodes
        if free >= decodes * (steps // size + 1):
            return steps
        if free >= decodes:
            return max(1, (free // decodes - 1) * size)
        return max(1, self._growth[0][0] - self._steps)

    def _grow(self, step: int) -> bool:
        """Blocks for all decodes up to and including `step`; False where there are none left."""
        growth, size, pool = self._growth, self._size, self.pool
        while growth and growth[0][0] <= step:
            due, order, sequence = growth[0]
            if sequence.turn != order:
                heapq.heappop(growth)
                continue
            fresh = pool.allocate(1)
            if fresh is None:
                return False
            sequence.blocks.extend(fresh)
            heapq.heapreplace(growth, (due + size, order, sequence))
        return True

    def _plan_by_scheduler(self) -> _Run | None:
        """The scheduler's own plan over the true sequences; it may preempt."""
        for sequence in self.scheduler.running if self._decodes else ():
            self.bring_up(sequence)
            sequence.joined = sequence.turn = -1
        now_s = self._events.now_s()
        batch = self.scheduler.next_batch(now_s)
        self._decodes = self._context_tokens = 0
        self._prompts, self._fresh, self._ends, self._growth = [], [], [], []
        self._recount()
        return _Run(now_s, 1, 0, batch=batch, shape=_shape_of(batch)) if batch else None

    def _shape(self, run: _Run) -> StepShape:
        if run.shape is not None:
            return run.shape
        chunks = [(s.computed, s.computed + count) for s, count in run.chunks]
        return StepShape(chunks, run.sequences, self._context_tokens)

    def _done_steps(self, run: _Run) -> int:
        """Steps of a run that have ended by now; the last one has not."""
        if run.steps <= 1:
            return 0
        elapsed_s, model = self._events.now_s() - run.began_s, self.spec.latency
        sequences, context_tokens, last = run.sequences, self._context_tokens, run.steps - 1
        done = min(last, int(run.steps * elapsed_s / (run.ends_s - run.began_s)))
        while done > 0 and model.decode_run_s(sequences, context_tokens, done) > elapsed_s:
            done -= 1
        while done < last:  # steps grow, so more have ended than their share of the run's time
            if model.decode_run_s(sequences, context_tokens, done + 1) > elapsed_s:
                break
            done += 1
        return done

    # -- a step ends ----------------------------------------------------------------------------

    def _end(self, run: _Run) -> None:
        if run is not self._run or run.ends_s != self._events.now_s() or self._dead:
            return  # it was cut short, and ended then
        self._settling = True
        self._busy_s += run.ends_s - run.began_s
        if run.chunks or run.batch:
            shape = self._shape(run)
            self.scheduler.did(shape.prefill)
            if self.scheduler.budget.learns(run.ends_s):
                self._learn(shape, run.ends_s - run.began_s)
        else:
            self.scheduler.did((), run.steps)
        if run.batch is not None:
            self._apply(run.batch)
        else:
            self._apply_run(run)
        for call in self._take_calls():
            call()
        self._run, self._settling = None, False
        self._report = None
        self._on_space()
        self.tell_kv()
        if self._run is None:  # else what came of it has begun the next
            self._begin()

    def _take_calls(self) -> list[Callable[[], None]]:
        calls, self._after_step = self._after_step, []
        return calls

    def _learn(self, step: StepShape, seconds: float) -> None:
        """As the runner does."""
        sequences, context_tokens = step.decode_sequences, step.decode_context_tokens
        if step.prefill and sequences:
            now_s = self._events.now_s()
            self.scheduler.budget.saw(step.prefill, sequences, context_tokens, seconds, now_s)

    def _apply_run(self, run: _Run) -> None:
        if not run.chunks and run.steps > 1:
            self._grow(self._steps + run.steps - 1)
        self._count(run.steps)
        done = {s for s, count in run.chunks if self._feed(s, count)}
        for sequence, _ in run.chunks:
            self._sort_prompt(sequence, sequence in done)
        ends = self._ends
        while ends and ends[0][0] <= self._steps:
            _, order, sequence = heapq.heappop(ends)
            if sequence.turn != order:
                continue
            self.bring_up(sequence)
            self._leave_decodes(sequence)
            sequence.publish(self.pool, self._size)
            self._sampled(sequence)

    def _sort_prompt(self, sequence: SimSequence, is_done: bool) -> None:
        """One that was fed. If one token is left of it, it is fed that with the decodes."""
        if is_done:
            self._prompts.remove(sequence)
        elif sequence.pending_tokens == 1:
            self._prompts.remove(sequence)
            self._queued_tokens -= 1
            self._fresh.append(sequence)

    def _count(self, steps: int) -> None:
        """So many steps of the decodes have ended."""
        self._steps += steps
        self._context_tokens += steps * self._decodes

    def _feed(self, sequence: SimSequence, count: int) -> bool:
        """Positions of a prompt were computed; whether they were its last, and a token sampled."""
        sequence.computed += count
        self._queued_tokens -= count
        sequence.publish(self.pool, self._size)
        if sequence.pending_tokens > 0:
            sequence.leg.computed(sequence)
            return False
        sequence.append()
        self._sampled(sequence)
        return True

    def _sampled(self, sequence: SimSequence) -> None:
        """A token that may be its first or its last. If neither, it decodes on."""
        goes_on = True
        if sequence.known_tokens == sequence.context_tokens + 1:
            sequence.leg.computed(sequence)
            goes_on = sequence.leg.first_token(sequence)
        if goes_on and sequence.outputs_left > 0:
            self._fresh.append(sequence)
            return
        self.scheduler.finish(sequence)
        if goes_on:
            self._past.ended(sequence.known_tokens - sequence.prompt_tokens)
            sequence.leg.ended(sequence)

    def bring_up(self, sequence: SimSequence) -> None:
        """Counts of a decoding sequence, true at the last step that was counted: within a run of
        equal steps, at its begin.
        """
        if sequence.joined >= 0:
            steps = self._steps - sequence.joined
            sequence.computed += steps
            sequence.known_tokens += steps
            sequence.outputs_left -= steps
            sequence.joined = self._steps

    def _leave_decodes(self, sequence: SimSequence) -> None:
        sequence.joined = sequence.turn = -1
        self._decodes -= 1
        self._context_tokens -= sequence.known_tokens

    def _apply(self, batch: list[tuple[SimSequence, int]]) -> None:
        """What the scheduler planned was done, step by step."""
        self.scheduler.step_ended()
        for sequence, count in batch:
            sequence.computed += count
            known, left = sequence.known_tokens, sequence.outputs_left
            if sequence.computed < known:
                sequence.publish(self.pool, self._size)
                sequence.leg.computed(sequence)
            elif count == 1 and known > sequence.context_tokens and left > 1:
                # One more token of an answer, whose prompt is published.
                sequence.known_tokens, sequence.outputs_left = known + 1, left - 1
                self._fresh.append(sequence)
            else:
                sequence.publish(self.pool, self._size)
                sequence.append()
                self._sampled(sequence)
        self._fresh = list(self.scheduler.running)
        self._recount()

    def _drop_cancelled(self) -> None:
        self._cancelled = False
        here = chain(self.scheduler.waiting, self.scheduler.running)
        cancelled = [sequence for sequence in here if sequence.cancelled]
        if not cancelled:  # a leg was dropped before it came here
            return
        for sequence in cancelled:
            if sequence.joined >= 0:
                self.bring_up(sequence)
                self._leave_decodes(sequence)
            self.scheduler.finish(sequence)
        self._prompts = [s for s in self._prompts if not s.cancelled]
        self._fresh = [s for s in self._fresh if not s.cancelled]
        self._recount()

    def _recount(self) -> None:
        """The queued tokens, from the sequences themselves."""
        waiting, running = self.scheduler.waiting, self.scheduler.running
        for sequence in waiting:
            sequence.queued_tokens = sequence.pending_tokens - sequence.cached_tokens
        prompts = [n for s in running if (n := s.known_tokens - s.computed) > 1]
        self._queued_tokens = sum(s.queued_tokens for s in waiting) + sum(prompts)


def _shape_of(batch: Sequence[tuple[SimSequence, int]]) -> StepShape:
    """Of a step that feeds so many tokens to each."""
    prompts = [(s.computed, s.computed + n) for s, n in batch if s.known_tokens - s.computed > 1]
    decodes = [s.known_tokens for s, _ in batch if s.known_tokens - s.computed == 1]
    return StepShape(prompts, len(decodes), sum(decodes))


def _queued(sequence: SimSequence) -> int:
    """Prompt tokens of a running sequence that count as queued; a lone one is a decode."""
    return sequence.pending_tokens if sequence.pending_tokens > 1 else 0


def _held(sequence: SimSequence, steps: int) -> Held:
    """As it is when so many steps of the worker have ended."""
    known = sequence.known_tokens
    if sequence.joined >= 0:
        known += steps - sequence.joined
    return Held(known, known - sequence.prompt_tokens, sequence.most_tokens - known)
