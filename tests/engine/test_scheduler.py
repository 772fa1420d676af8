"""Who begins where memory is short, and who gives way. test_runner.py has the rest of it."""

from collections.abc import Callable, Iterator

import pytest

from core.ids import BlockId
from core.step import StepBudget
from engine.pool import BlockPool
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceState
from tests.builders import make_prompt, make_sequence

SIZE = 4


class Crowded:
    """A scheduler over a pool of 8 blocks, and prompts that were preempted half computed."""

    def __init__(self) -> None:
        self.pool = BlockPool(8)
        self.scheduler = Scheduler[Sequence](
            self.pool,
            block_size=SIZE,
            step_tokens=64,
            max_batch=8,
            on_admitted=lambda sequence: None,
        )
        self.given_up: list[Sequence] = []

    def preempted(self, seed: int, *, blocks: int, leased: int, arrived_at_s: float) -> Sequence:
        """It needs so many blocks, of which a lease keeps the first."""
        sequence = make_sequence(make_prompt(blocks * SIZE, seed), name=str(seed))
        sequence.arrived_at_s = arrived_at_s
        kept = sequence.blocks = self.pool.allocate(leased) or []
        sequence.computed = leased * SIZE
        sequence.publish(self.pool, SIZE)
        self.pool.lease(kept)
        self.pool.release(kept)
        sequence.blocks, sequence.computed, sequence.published = [], 0, 0
        sequence.on_starved = self._gives_up(sequence, kept)
        self.scheduler.waiting.append(sequence)
        return sequence

    def _gives_up(self, sequence: Sequence, kept: list[BlockId]) -> Callable[[], None]:
        def give_up() -> None:
            self.scheduler.finish(sequence)
            self.pool.unlease(kept)
            self.given_up.append(sequence)

        return give_up

    def waits(self, seed: int, blocks: int) -> Sequence:
        """One that keeps nothing, first in line."""
        sequence = make_sequence(make_prompt(blocks * SIZE, seed), name=str(seed))
        self.scheduler.waiting.insert(0, sequence)
        return sequence


def test_a_preempted_prompt_goes_on_before_one_that_waits_for_what_it_keeps() -> None:
    crowd = Crowded()
    prompt = crowd.preempted(1, blocks=7, leased=4, arrived_at_s=1.0)
    first = crowd.waits(2, blocks=5)
    crowd.scheduler.admit(1.0)
    assert (prompt.state, first.state) == (SequenceState.RUNNING, SequenceState.WAITING)
    assert crowd.given_up == []


def test_of_two_that_keep_each_other_out_the_younger_is_given_up() -> None:
    crowd = Crowded()
    older = crowd.preempted(1, blocks=6, leased=3, arrived_at_s=1.0)
    younger = crowd.preempted(2, blocks=6, leased=3, arrived_at_s=2.0)
    crowd.scheduler.admit(3.0)
    assert crowd.given_up == [], "what others hold may come back by itself"
    crowd.scheduler.admit(5.5)
    assert crowd.given_up == [younger]
    assert older.state is SequenceState.RUNNING
    crowd.pool.check()


def test_while_somebody_runs_nobody_is_given_up() -> None:
    crowd = Crowded()
    running = make_sequence(make_prompt(3, 9), name="running")
    crowd.scheduler.enqueue(running)
    crowd.scheduler.admit(0.0)
    older = crowd.preempted(1, blocks=5, leased=3, arrived_at_s=1.0)
    younger = crowd.preempted(2, blocks=4, leased=3, arrived_at_s=2.0)
    crowd.scheduler.admit(3.0)
    assert crowd.given_up == []
    assert {older.state, younger.state} == {SequenceState.WAITING}


def test_who_keeps_nothing_waits_for_those_who_read_what_others_leased() -> None:
    crowd = Crowded()
    blocks = crowd.pool.allocate(6) or []
    crowd.pool.lease(blocks)
    crowd.pool.release(blocks)
    first, second = crowd.waits(1, blocks=4), make_sequence(make_prompt(SIZE, 2), name="2")
    crowd.scheduler.enqueue(second)
    crowd.scheduler.admit(0.0)
    assert {first.state, second.state} == {SequenceState.WAITING}


@pytest.mark.parametrize(("answered", "fed"), [(0, [64]), (10, [127])], ids=["new", "preempted"])
def test_prompts_behind_a_preempted_one_are_held_to_the_target_of_a_step_as_behind_any(
    answered: int, fed: list[int]
) -> None:
    budget = StepBudget(1e-3)  # less than anything takes: of prompts the least
    for second in range(4):
        budget.saw([(0, 64)], 1, 9, 1.0, float(second))
    scheduler = Scheduler[Sequence](
        BlockPool(400),
        block_size=SIZE,
        step_tokens=1024,
        chunk_tokens=128,
        max_batch=8,
        on_admitted=lambda sequence: None,
        budget=budget,
    )
    answering = make_sequence(make_prompt(9, seed=0), name="answering")
    answering.computed = 8
    scheduler.join(answering, 0.0)
    first = make_sequence(make_prompt(200, seed=1), name="first")
    first.context_tokens -= answered
    scheduler.enqueue(first)
    for seed in range(2, 6):
        scheduler.enqueue(make_sequence(make_prompt(100, seed), name=str(seed)))
    batch = scheduler.next_batch(1.0)
    assert [count for sequence, count in batch if sequence is not answering] == fed


@pytest.mark.parametrize(
    ("common", "fed"), [(24, [32, 30]), (8, [32, 32, 30])], ids=["most of it", "little of it"]
)
def test_a_prompt_whose_prefix_this_very_step_computes_begins_with_the_next_one(
    common: int, fed: list[int]
) -> None:
    scheduler = Scheduler[Sequence](
        BlockPool(400),
        block_size=SIZE,
        step_tokens=256,
        chunk_tokens=64,
        max_batch=8,
        on_admitted=lambda sequence: None,
    )
    prefix = make_prompt(common, seed=0)
    prompts = [(*prefix, *make_prompt(32 - common, seed)) for seed in (1, 2)]
    first, second = (make_sequence(prompt, name=f"{prompt[-1]}") for prompt in prompts)
    other = make_sequence(make_prompt(30, seed=3), name="other")
    for sequence in (first, second, other):
        scheduler.enqueue(sequence)
    batch = scheduler.next_batch(1.0)
    assert [count for _, count in batch] == fed
    for sequence, count in batch:
        sequence.computed += count
        sequence.publish(scheduler._pool, SIZE)
        scheduler.finish(sequence)
    scheduler.step_ended()
    later = scheduler.next_batch(2.0)
    assert later == ([] if second.done else [(second, 32 - common)])


def test_prompts_keep_their_order_while_more_run_than_a_batch_holds() -> None:
    scheduler = Scheduler[Sequence](
        BlockPool(400),
        block_size=SIZE,
        step_tokens=32,
        max_batch=4,
        on_admitted=lambda sequence: None,
    )
    prompts = [make_sequence(make_prompt(40, seed), name=str(seed)) for seed in range(9)]
    for sequence in prompts:
        scheduler.enqueue(sequence)
    done: list[Sequence] = []
    for step in range(12):
        for sequence, count in scheduler.next_batch(float(step)):
            sequence.computed += count
            if not sequence.pending_tokens:
                done.append(sequence)
                scheduler.finish(sequence)
        scheduler.step_ended()
    assert done == prompts


def test_answers_take_turns_while_more_decode_than_a_batch_holds() -> None:
    scheduler = Scheduler[Sequence](
        BlockPool(400),
        block_size=SIZE,
        step_tokens=32,
        max_batch=4,
        on_admitted=lambda sequence: None,
    )
    answers = [make_sequence(make_prompt(9, seed), name=str(seed)) for seed in range(9)]
    for sequence in answers:
        sequence.computed = 8
        scheduler.join(sequence, 0.0)
    scheduler.enqueue(make_sequence(make_prompt(1000, seed=9), name="prompt"))
    fed = [sequence for step in range(6) for sequence, _ in scheduler.next_batch(float(step))]
    assert [fed.count(sequence) for sequence in answers] == [2] * 9


class NotLookedAt(list[Sequence]):
    """A line that may be long."""

    def __iter__(self) -> Iterator[Sequence]:
        raise AssertionError("somebody looks at all who wait")


def test_tokens_that_wait_are_counted_as_they_come_and_go() -> None:
    crowd = Crowded()
    scheduler, sequences = crowd.scheduler, [make_sequence(make_prompt(14, n)) for n in range(4)]

    def queued() -> int:
        uncached = sum(s.pending_tokens - s.cached_tokens for s in scheduler.waiting)
        scheduler.waiting, waiting = NotLookedAt(scheduler.waiting), scheduler.waiting
        tokens, scheduler.waiting = scheduler.load().queued_tokens, waiting
        assert tokens == uncached + sum(s.pending_tokens for s in scheduler.running)
        return tokens

    for sequence in sequences:
        scheduler.enqueue(sequence)
    assert (queued(), len(scheduler.waiting)) == (56, 4)
    scheduler.admit(0.0)
    assert (queued(), len(scheduler.waiting)) == (56, 2)
    first = sequences[0]
    first.computed = 12
    first.publish(crowd.pool, SIZE)
    assert queued() == 44
    scheduler._preempt(first)
    assert (queued(), len(scheduler.waiting)) == (56, 3)
    again = make_sequence(make_prompt(14, 0))
    scheduler.enqueue(again)
    assert again.cached_tokens == 12
    assert queued() == 58
    scheduler.admit(1.0)
    assert queued() == 46
    for sequence in [*sequences, again]:
        scheduler.finish(sequence)
        queued()
    assert queued() == 0


def test_blocks_are_awaited_once_the_first_in_line_has_waited_for_a_while() -> None:
    crowd = Crowded()
    held = crowd.pool.allocate(6)
    first = crowd.waits(1, blocks=5)
    crowd.scheduler.admit(1.0)
    assert crowd.scheduler.awaited_blocks(1.0) == 0
    assert crowd.scheduler.awaited_blocks(3.0) == 5
    preempted = crowd.waits(2, blocks=4)
    assert crowd.scheduler.awaited_blocks(3.0) == 0, "it is first in line only now"
    crowd.scheduler.admit(3.0)
    assert crowd.scheduler.awaited_blocks(5.0) == 4
    crowd.pool.release(held or [])
    crowd.scheduler.admit(6.0)
    assert preempted.state is SequenceState.RUNNING
    assert (first.state, crowd.scheduler.awaited_blocks(8.0)) == (SequenceState.WAITING, 5)


def test_of_a_cached_prefix_only_what_could_be_evicted_is_awaited() -> None:
    crowd = Crowded()
    first = make_sequence(make_prompt(5 * SIZE, 1), name="1")
    blocks = crowd.pool.allocate(3) or []
    root = make_sequence(make_prompt(1), name="root")._root
    hashes = first.block_hashes(3, SIZE)
    crowd.pool.publish(blocks, 0, hashes, root)
    crowd.pool.release(blocks[2:])
    busy = crowd.pool.allocate(4) or []
    crowd.scheduler.waiting.append(first)
    crowd.scheduler.admit(0.0)
    assert crowd.scheduler.awaited_blocks(2.0) == 3, "two of its five are in use"
    crowd.pool.release(busy)
    crowd.scheduler.admit(3.0)
    assert first.state is SequenceState.RUNNING
