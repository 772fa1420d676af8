"""What runs in the next step of a worker, and which blocks it has: the decisions of the runner.

Synchronous, and without a clock, a thread or a model of its own. `engine/runner.py` drives it in a
loop; the simulator drives the same one under a virtual clock.

    enqueue -> waiting --admit (all blocks of its context, or it stays)--> running -> done
                 ^------------ preempted: blocks back, KV recomputed later ----'| ^
                                                                           hold v | resume
                                                                              held -> removed

While a step is in flight nothing it reads or writes is freed: a sequence finished meanwhile gives
its blocks back when the step has ended.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import compress, takewhile
from typing import Generic, Protocol, TypeVar

from core.errors import InternalError
from core.ids import BlockHash, BlockId
from core.step import StepBudget, StepWork
from engine.planner import plan_step
from engine.pool import BlockPool
from engine.sequence import SequenceState

_STUCK_S = 2.0
"""Blocks that are read from here, come in or are in quarantine come back by themselves, mostly."""
_OVERTAKEN_S = 2.0
"""Mostly the first in line finds its blocks sooner, and what it needs is not kept idle for it."""
_RUNNING = SequenceState.RUNNING  # read through the class, it costs more than the rest of a look


class Schedulable(Protocol):
    """What scheduling has to know of a sequence, and writes to it; see engine.sequence.Sequence."""

    state: SequenceState
    arrived_at_s: float
    started_at_s: float | None
    work_before: StepWork
    context_tokens: int
    computed: int
    cached_tokens: int
    published: int
    blocks: list[BlockId]
    on_preempted: Callable[[], None] | None
    on_starved: Callable[[], None] | None

    @property
    def known_tokens(self) -> int: ...

    @property
    def pending_tokens(self) -> int: ...

    def block_hashes(self, count: int, block_size: int) -> Sequence[BlockHash]: ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerLoad:
    """What the loop has to do."""

    queued_tokens: int
    waiting: int
    running: int
    context_tokens: int
    decoding: int
    """Of those running, those of which one token is to be fed."""
    decoding_tokens: int
    """The context of those."""


class Scheduler(Generic[S]):
    """Owns the queues. `on_admitted` hears of sequences that begin with a cached prefix. While
    `max_running` run, others wait, as in vLLM's max_num_seqs. `budget` bounds what a step takes of
    prompts while others decode.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        step_tokens: int,
        max_batch: int,
        on_admitted: Callable[[S], None],
        chunk_tokens: int | None = None,
        max_running: int | None = None,
        budget: StepBudget | None = None,
    ) -> None:
        self._pool = pool
        self.budget = budget or StepBudget(None)
        self._max_running = max_running
        self._block_size = block_size
        self._step_tokens = step_tokens
        self._chunk_tokens = chunk_tokens
        self._max_batch = max_batch
        self._on_admitted = on_admitted
        self.waiting: list[S] = []
        self._waiting_tokens = 0
        self.running: list[S] = []
        self.held: list[S] = []
        self._in_flight: set[int] = set()
        self._late_release: list[list[BlockId]] = []
        self._stuck_since_s: float | None = None
        self._first: S | None = None
        """In line, since then."""
        self._first_since_s = 0.0
        self.preemptions = 0
        self.work = StepWork()
        """Of all steps that have ended."""

    # -- coming and going -----------------------------------------------------------------------

    def enqueue(self, sequence: S) -> None:
        """A sequence whose context must (in part) be computed here."""
        sequence.cached_tokens = len(self._lookup(sequence)) * self._block_size
        self._waiting_tokens += _uncached(sequence)
        self.waiting.append(sequence)

    def join(self, sequence: S, now_s: float) -> None:
        """A sequence whose blocks are in place: their references are the scheduler's now."""
        sequence.state = _RUNNING
        sequence.started_at_s = now_s
        self.running.append(sequence)

    def hold(self, sequence: S) -> None:
        """Take a running sequence out of the batch, between two of its steps."""
        if sequence.state is not _RUNNING or id(sequence) in self._in_flight:
            raise InternalError("a sequence cannot be held now")
        self.running.remove(sequence)
        sequence.state = SequenceState.HELD
        self.held.append(sequence)

    def resume(self, sequence: S) -> None:
        """A held one goes on."""
        self.held.remove(sequence)
        sequence.state = _RUNNING
        self.running.append(sequence)

    def finish(self, sequence: S) -> None:
        """It is done, wherever it is now; its blocks go back, at the latest when the step ends."""
        match sequence.state:
            case SequenceState.WAITING:
                self._waiting_tokens -= _uncached(sequence)
                self.waiting.remove(sequence)
            case SequenceState.HELD:
                self.held.remove(sequence)
            case _:
                self.running.remove(sequence)
        sequence.state = SequenceState.DONE
        blocks, sequence.blocks = sequence.blocks, []
        if id(sequence) in self._in_flight:
            self._late_release.append(blocks)
        else:
            self._pool.release(blocks)

    @property
    def idle(self) -> bool:
        """Nothing waits or runs, and no step still holds blocks of what was removed."""
        open_ = self.waiting or self.running or self.held
        return not (open_ or self._in_flight or self._late_release)

    def awaited_blocks(self, now_s: float) -> int:
        """Blocks that have to be free or evictable for the first in line, once it has been that for
        a while; else 0. What comes for others leaves them, or short ones keep a long one waiting.
        """
        if not self.waiting or self.waiting[0] is not self._first:
            return 0
        if self._max_running is not None and len(self.running) >= self._max_running:
            return 0  # it waits for a place, not for blocks
        if now_s - self._first_since_s < _OVERTAKEN_S:
            return 0
        first = self.waiting[0]
        cached = self._lookup(first)
        evictable = self._pool.available - self._pool.available_beside(cached)
        return -(-first.known_tokens // self._block_size) - len(cached) + evictable

    def load(self) -> RunnerLoad:
        """True load, for reports and admission."""
        pending = [(s.pending_tokens, s.known_tokens) for s in self.running]
        decoding = [known for tokens, known in pending if tokens == 1]
        return RunnerLoad(
            queued_tokens=self._waiting_tokens + sum(tokens for tokens, _ in pending if tokens > 1),
            waiting=len(self.waiting),
            running=len(self.running) + len(self.held),
            context_tokens=sum(known for _, known in pending)
            + sum(s.known_tokens for s in self.held),
            decoding=len(decoding),
            decoding_tokens=sum(decoding),
        )

    # -- the step -------------------------------------------------------------------------------

    def next_batch(self, now_s: float) -> list[tuple[S, int]]:
        """Who is fed how many tokens now; all of them have the blocks for it. Empty: nothing can
        run. It is in flight until `step_ended`.
        """
        self.admit(now_s)
        pending, size = [s.pending_tokens for s in self.running], self._block_size
        step_tokens = self._tokens_now(pending)
        feed = plan_step(pending, step_tokens, self._max_batch, self._chunk_tokens)
        planned = list(zip(self.running, feed, strict=True))
        if len(planned) > self._max_batch:
            self._take_turns(pending, feed)
        batch: list[tuple[S, int]] = []
        begun: list[S] = []
        coming: set[BlockHash] = set()
        for sequence, most in planned:
            if not most or sequence.state is not _RUNNING:
                continue
            count = most
            if sequence.started_at_s is None:
                self.reuse(sequence)
                count = min(most, sequence.pending_tokens)
                if self.begins_later(sequence, count, coming):
                    continue
                begun.append(sequence)
            end = sequence.computed + count
            if end <= len(sequence.blocks) * size or self._grow(sequence, end):
                batch.append((sequence, count))
                if count > 1:
                    coming.update(self.blocks_of(sequence, count))
        batch = [fed for fed in batch if fed[0].state is _RUNNING]
        self._in_flight = {id(sequence) for sequence, _ in batch}
        for sequence in begun:
            if sequence.state is _RUNNING:
                self.began(sequence, now_s)
        return batch

    def _take_turns(self, pending: Sequence[int], feed: Sequence[int]) -> None:
        """More may run than a step feeds: of those that decode who is fed now is last next time.
        Prompts keep their order.
        """
        decodes = [tokens == count == 1 for tokens, count in zip(pending, feed, strict=True)]
        others = [not decode for decode in decodes]
        self.running = [*compress(self.running, others), *compress(self.running, decodes)]

    def began(self, sequence: S, now_s: float) -> None:
        """Its first step begins."""
        sequence.started_at_s, sequence.work_before = now_s, self.work

    def did(self, chunks: Sequence[tuple[int, int]], steps: int = 1) -> None:
        """So many steps have ended, which computed positions [start, end) of each chunk."""
        self.work = self.work.plus(chunks, steps)

    def step_tokens(self, decodes: int, context_tokens: int, prompt: S) -> int:
        """Of a step in which so many sequences decode and `prompt` is the first that does not."""
        most = self._step_tokens
        if self.budget.step_s is not None and prompt.known_tokens > prompt.context_tokens:
            # It was preempted and its client waits for the next token: not slowed. But those behind
            # it, which would be, share no step that is longer than its chunk.
            return min(most, decodes + (self._chunk_tokens or most))
        chunk = self.budget.chunk_tokens(prompt.computed, decodes, context_tokens, most)
        return min(most, decodes + chunk)

    def _tokens_now(self, pending: Sequence[int]) -> int:
        first = next((i for i, tokens in enumerate(pending) if tokens > 1), None)
        prompt = None if first is None else self.running[first]
        if prompt is None or not self.budget.step_s:
            return self._step_tokens
        decoding = zip(self.running, pending, strict=True)
        contexts = [s.known_tokens for s, tokens in decoding if tokens == 1]
        return self.step_tokens(len(contexts), sum(contexts), prompt)

    def step_ended(self) -> None:
        """The step reads and writes no more."""
        self._in_flight = set()
        for blocks in self._late_release:
            self._pool.release(blocks)
        self._late_release.clear()

    def admit(self, now_s: float) -> None:
        """Those that wait begin, in order, until one does not find its blocks."""
        most = self._max_running
        while self.waiting and (most is None or len(self.running) < most):
            if not self._admit(self.waiting[0], now_s) and not self._unblock(now_s):
                break
        first = self.waiting[0] if self.waiting else None
        if first is not self._first:
            self._first, self._first_since_s = first, now_s

    def _unblock(self, now_s: float) -> bool:
        """The first in line finds too few blocks: whether to look again. Where nobody runs who
        would give some back, a preempted prompt behind it may keep them by its lease. It goes on;
        where none of these can for a while, the youngest is given up.
        """
        if self.running or self.held:  # mostly, and the line may be long
            self._stuck_since_s = None
            return False
        leased = [sequence for sequence in self.waiting if sequence.on_starved is not None]
        if not leased:
            self._stuck_since_s = None
            return False
        if any(self._admit(sequence, now_s) for sequence in leased):
            return False
        if self._stuck_since_s is None:
            self._stuck_since_s = now_s
        if now_s - self._stuck_since_s < _STUCK_S:
            return False
        self._stuck_since_s = None
        youngest = max(leased, key=lambda s: s.arrived_at_s)
        give_up, youngest.on_starved = youngest.on_starved, None
        if give_up is not None:
            give_up()
        return True

    def _admit(self, sequence: S, now_s: float) -> bool:
        """Take all blocks of the known tokens, reusing cached ones, or leave it waiting."""
        cached = self._lookup(sequence)
        missing = -(-sequence.known_tokens // self._block_size) - len(cached)
        if missing > self._pool.available_beside(cached):
            return False
        self._pool.acquire(cached)
        fresh = self._pool.allocate(missing)
        if fresh is None:
            raise InternalError("allocation failed although the blocks were counted")
        self._waiting_tokens -= _uncached(sequence)
        sequence.blocks = [*cached, *fresh]
        sequence.published = len(cached)
        sequence.computed = len(cached) * self._block_size
        if sequence.started_at_s is None:
            sequence.cached_tokens = sequence.computed
        sequence.state = _RUNNING
        self._stuck_since_s = None
        self.waiting.remove(sequence)
        self.running.append(sequence)
        if sequence.computed:
            self._on_admitted(sequence)
        return True

    def reuse(self, sequence: S) -> None:
        """It is about to begin: what others have computed since it was admitted is cached now."""
        begin, full = sequence.published, (sequence.known_tokens - 1) // self._block_size
        found = self._pool.lookup(sequence.block_hashes(full, self._block_size)[begin:])
        if not found:
            return
        end = begin + len(found)
        self._pool.acquire(found)
        self._pool.release(sequence.blocks[begin:end])
        sequence.blocks[begin:end] = found
        sequence.published = end
        sequence.computed = sequence.cached_tokens = end * self._block_size
        self._on_admitted(sequence)

    def blocks_of(self, sequence: S, count: int) -> Sequence[BlockHash]:
        """What so many more tokens of it will leave in the cache."""
        full = (sequence.computed + count) // self._block_size
        return sequence.block_hashes(full, self._block_size)[sequence.published :]

    def begins_later(self, sequence: S, count: int, coming: Container[BlockHash]) -> bool:
        """Whether half or more of what it would be fed are blocks that others fill in this very
        step: it finds them in the cache in the next one.
        """
        full = (sequence.known_tokens - 1) // self._block_size
        hashes = sequence.block_hashes(full, self._block_size)[sequence.published :]
        shared = sum(1 for _ in takewhile(lambda block: block in coming, hashes))
        return 0 < count <= 2 * shared * self._block_size

    def _lookup(self, sequence: S) -> list[BlockId]:
        """Cached blocks of its known tokens, but for the last one, which must be fed."""
        full = (sequence.known_tokens - 1) // self._block_size
        return self._pool.lookup(sequence.block_hashes(full, self._block_size))

    def _grow(self, sequence: S, end: int) -> bool:
        """Blocks up to position `end`; preempts the youngest when there are none left."""
        missing = -(-end // self._block_size) - len(sequence.blocks)
        while missing > 0:
            fresh = self._pool.allocate(missing)
            if fresh is not None:
                sequence.blocks.extend(fresh)
                return True
            youngest = max(self.running, key=lambda s: s.arrived_at_s)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: S) -> None:
        """Give its blocks back and compute its KV again later; the text stays the same."""
        self.preemptions += 1
        if sequence.on_preempted is not None:
            sequence.on_preempted()  # ends a lease, which would keep the blocks
        self.running.remove(sequence)
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.cached_tokens = 0
        sequence.published = sequence.computed = 0
        sequence.state = SequenceState.WAITING
        self._waiting_tokens += _uncached(sequence)
        self.waiting.insert(0, sequence)


def _uncached(sequence: Schedulable) -> int:
    """Tokens to compute of one that waits: the same all the while."""
    return sequence.pending_tokens - sequence.cached_tokens
