"""The engine loop: whatever is batched, cached, preempted or cancelled, the tokens are the same."""

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from core.clock import FakeClock
from core.errors import DeadlineExceeded, InternalError, KvMismatch
from core.sampling import FinishReason
from core.step import StepBudget, StepWork
from engine.pool import PoolCounts
from engine.runner import Runner
from engine.sequence import Sequence
from engine.types import Sampled
from tests.builders import (
    BLOCK_SIZE,
    Heard,
    StepGate,
    expected_tokens,
    make_engine,
    make_prompt,
    make_sequence,
    running_engine_loop,
    soon,
    until,
)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 15, 16, 17, 50])
async def test_a_prompt_in_chunks_gives_the_engines_tokens(num_tokens: int) -> None:
    prompt = make_prompt(num_tokens)
    async with running_engine_loop(make_engine(), step_tokens=16) as parts:
        heard = parts.submit(make_sequence(prompt, max_tokens=9))
        await soon(heard.ended.wait())
    assert heard.tokens == expected_tokens(prompt, 9)
    assert heard.finish is FinishReason.LENGTH


async def test_sequences_in_one_batch_do_not_touch_each_other() -> None:
    prompts = [make_prompt(3 + 5 * i, seed=i) for i in range(6)]
    async with running_engine_loop(make_engine(128), step_tokens=16, max_batch=4) as parts:
        heard = [
            parts.submit(make_sequence(prompt, name=str(i), max_tokens=12))
            for i, prompt in enumerate(prompts)
        ]
        for each in heard:
            await soon(each.ended.wait())
    assert [each.tokens for each in heard] == [expected_tokens(prompt, 12) for prompt in prompts]


async def test_a_stop_token_ends_the_sequence() -> None:
    prompt = make_prompt(6)
    tokens = expected_tokens(prompt, 3)
    async with running_engine_loop(make_engine()) as parts:
        heard = parts.submit(make_sequence(prompt, stop_token_ids=[tokens[2]], max_tokens=50))
        await soon(heard.ended.wait())
    assert (heard.tokens, heard.finish) == (tokens, FinishReason.STOP)


async def test_blocks_are_told_as_they_are_computed() -> None:
    async with running_engine_loop(make_engine(), step_tokens=8) as parts:
        heard = parts.submit(make_sequence(make_prompt(20), max_tokens=3))
        await soon(heard.ended.wait())
    assert heard.computed == [8, 16, 20]


async def test_a_step_that_hangs_tells_its_age() -> None:
    gate, clock = StepGate(), FakeClock()
    async with running_engine_loop(make_engine(sleep=gate), clock) as parts:
        assert parts.runner.step_age_s == 0
        heard = parts.submit(make_sequence(make_prompt(6), max_tokens=1, deadline_at_s=1e9))
        await until(gate.waiting.is_set, "a step")
        clock.advance(7.0)
        assert parts.runner.step_age_s == 7.0
        gate.open()
        await soon(heard.ended.wait())
        await until(lambda: parts.runner.step_age_s == 0, "its end")


async def test_a_cached_prefix_is_not_computed_again() -> None:
    prompt = make_prompt(22)
    async with running_engine_loop(make_engine()) as parts:
        await soon(parts.submit(make_sequence(prompt, name="a")).ended.wait())
        again = make_sequence(prompt, name="b")
        heard = parts.submit(again)
        await soon(heard.ended.wait())
    assert again.cached_tokens == 20
    assert heard.computed[0] == 20
    assert heard.tokens == expected_tokens(prompt, 8)


async def test_the_last_token_is_fed_even_when_its_block_is_cached() -> None:
    prompt = make_prompt(8)
    async with running_engine_loop(make_engine()) as parts:
        await soon(parts.submit(make_sequence(prompt, name="a")).ended.wait())
        again = make_sequence(prompt, name="b")
        heard = parts.submit(again)
        await soon(heard.ended.wait())
    assert again.cached_tokens == 4
    assert heard.tokens == expected_tokens(prompt, 8)


async def test_preemption_in_a_small_arena_keeps_every_text() -> None:
    prompts = [make_prompt(8, seed=i) for i in range(3)]
    async with running_engine_loop(make_engine(10)) as parts:
        heard = [
            parts.submit(make_sequence(prompt, name=str(i), max_tokens=24, arrived_at_s=float(i)))
            for i, prompt in enumerate(prompts)
        ]
        for each in heard:
            await soon(each.ended.wait())
        assert parts.runner.preemptions > 0
        parts.pool.check_idle()
    assert [each.tokens for each in heard] == [expected_tokens(prompt, 24) for prompt in prompts]


async def test_the_oldest_sequence_is_never_preempted() -> None:
    async with running_engine_loop(make_engine(10)) as parts:
        heard = [
            parts.submit(
                make_sequence(
                    make_prompt(8, seed=i), name=str(i), max_tokens=24, arrived_at_s=float(i)
                )
            )
            for i in range(3)
        ]
        await soon(heard[0].ended.wait())
        assert not heard[1].ended.is_set()
        assert not heard[2].ended.is_set()


async def test_a_sequence_removed_during_its_step_frees_its_blocks_afterwards() -> None:
    gate = StepGate()
    async with running_engine_loop(make_engine(sleep=gate)) as parts:
        sequence = make_sequence(make_prompt(8))
        heard = parts.submit(sequence)
        await until(gate.waiting.is_set, "a step in flight")
        parts.runner.remove(sequence)
        during = parts.pool.counts()
        gate.open()
        await until(lambda: parts.pool.counts().in_use == 0, "blocks given back")
    assert during.in_use == 2
    assert heard.tokens == []


async def test_a_waiting_sequence_can_be_removed() -> None:
    gate = StepGate()
    async with running_engine_loop(make_engine(4, sleep=gate)) as parts:
        first = parts.submit(make_sequence(make_prompt(14), name="a", max_tokens=1))
        waiting = make_sequence(make_prompt(12, seed=1), name="b")
        heard = parts.submit(waiting)
        await until(gate.waiting.is_set, "a step in flight")
        parts.runner.remove(waiting)
        gate.open()
        await soon(first.ended.wait())
        assert parts.runner.load().waiting == 0
    assert heard.tokens == []


async def test_removing_twice_does_nothing() -> None:
    async with running_engine_loop(make_engine()) as parts:
        sequence = make_sequence(make_prompt(8))
        heard = parts.submit(sequence)
        await soon(heard.ended.wait())
        parts.runner.remove(sequence)
        parts.runner.remove(sequence)
        parts.pool.check_idle()


async def test_a_running_sequence_ends_at_its_deadline() -> None:
    clock, gate = FakeClock(), StepGate()
    async with running_engine_loop(make_engine(sleep=gate), clock) as parts:
        heard = parts.submit(make_sequence(make_prompt(8), max_tokens=99, deadline_at_s=5.0))
        gate.allow(3)
        await until(lambda: len(heard.tokens) == 3)
        clock.advance(5.0)
        gate.allow(1)
        await soon(heard.ended.wait())
        await until(lambda: parts.pool.counts().in_use == 0)
        gate.open()
    assert isinstance(heard.error, DeadlineExceeded)
    assert len(heard.tokens) <= 4


async def test_a_waiting_sequence_ends_at_its_deadline() -> None:
    clock = FakeClock()
    async with running_engine_loop(make_engine(4), clock) as parts:
        taken = parts.pool.allocate(4) or []
        heard = parts.submit(make_sequence(make_prompt(8), deadline_at_s=5.0))
        await until(lambda: parts.runner.load().waiting == 1)
        clock.advance(5.0)
        parts.runner.wake()
        await soon(heard.ended.wait())
        parts.pool.release(taken)
    assert isinstance(heard.error, DeadlineExceeded)


async def test_a_waiting_deadline_is_seen_while_nothing_else_happens() -> None:
    clock = FakeClock()
    async with running_engine_loop(make_engine(4), clock) as parts:
        taken = parts.pool.allocate(4) or []
        heard = parts.submit(make_sequence(make_prompt(8), deadline_at_s=5.0))
        await until(lambda: parts.runner.load().waiting == 1)
        clock.advance(5.0)
        await soon(heard.ended.wait())
        parts.pool.release(taken)


async def test_the_head_of_the_line_waits_and_goes_on_when_blocks_are_released() -> None:
    prompt = make_prompt(12)
    async with running_engine_loop(make_engine(4)) as parts:
        taken = parts.pool.allocate(2) or []
        big = parts.submit(make_sequence(prompt, name="big", max_tokens=4))
        small = parts.submit(make_sequence(make_prompt(3), name="small", max_tokens=1))
        await until(lambda: parts.runner.load().waiting == 2)
        await asyncio.sleep(0)
        assert not small.ended.is_set()
        parts.pool.release(taken)
        parts.runner.wake()
        await soon(big.ended.wait())
        await soon(small.ended.wait())
    assert big.tokens == expected_tokens(prompt, 4)


async def test_a_sequence_whose_blocks_are_in_place_only_decodes() -> None:
    prompt = make_prompt(9)
    async with running_engine_loop(make_engine()) as parts:
        sequence = make_sequence(prompt, max_tokens=6)
        first = expected_tokens(prompt, 1)
        await soon(parts.submit(make_sequence(prompt, name="fill", max_tokens=1)).ended.wait())
        cached = parts.pool.lookup(sequence.block_hashes(2, BLOCK_SIZE))
        parts.pool.acquire(cached)
        sequence.blocks = list(cached)
        sequence.computed, sequence.published = 8, 2
        heard = Heard()
        parts.runner.submit_ready(sequence, heard)
        await soon(heard.ended.wait())
    assert heard.tokens[:1] == first
    assert heard.tokens == expected_tokens(prompt, 6)


async def test_damaged_kv_fails_its_sequence_and_no_other() -> None:
    gate = StepGate()
    prompts = [make_prompt(8, seed=i) for i in range(2)]
    async with running_engine_loop(make_engine(sleep=gate)) as parts:
        sequences = [
            make_sequence(prompt, name=str(i), max_tokens=6) for i, prompt in enumerate(prompts)
        ]
        bad, good = [parts.submit(sequence) for sequence in sequences]
        gate.allow(1)
        await until(lambda: bool(bad.tokens))
        await until(gate.waiting.is_set, "the next step in flight")
        parts.engine.arena.data[sequences[0].blocks[0]] = 0
        gate.open()
        await soon(bad.ended.wait())
        await soon(good.ended.wait())
        parts.pool.check_idle()
    assert isinstance(bad.error, KvMismatch)
    assert good.tokens == expected_tokens(prompts[1], 6)


# -- holding --------------------------------------------------------------------------------------


@dataclass
class Holding(Heard):
    """Holds its sequence with its third token."""

    runner: Runner | None = None
    held: asyncio.Event = field(default_factory=asyncio.Event)

    def on_token(self, sequence: Sequence, sampled: Sampled, finish: FinishReason | None) -> None:
        super().on_token(sequence, sampled, finish)
        if len(self.tokens) == 3 and self.runner is not None:
            self.runner.hold(sequence)
            self.held.set()


async def test_a_held_sequence_waits_with_its_blocks_while_others_go_on() -> None:
    prompts = [make_prompt(8, seed=i) for i in range(2)]
    async with running_engine_loop(make_engine()) as parts:
        held, sequence = Holding(runner=parts.runner), make_sequence(prompts[0], name="h")
        parts.runner.submit(sequence, held)
        await soon(held.held.wait())
        other = parts.submit(make_sequence(prompts[1], name="o"))
        await soon(other.ended.wait())
        assert (len(held.tokens), len(sequence.blocks), sequence.computed) == (3, 3, 10)
        assert not parts.runner.idle
        load = parts.runner.load()
        assert (load.running, load.context_tokens) == (1, 11)
        parts.runner.resume(sequence)
        await soon(held.ended.wait())
        parts.pool.check_idle()
    assert held.tokens == expected_tokens(prompts[0], 8)
    assert other.tokens == expected_tokens(prompts[1], 8)


async def test_a_held_sequence_can_be_removed_and_gives_its_blocks_back_at_once() -> None:
    async with running_engine_loop(make_engine()) as parts:
        held, sequence = Holding(runner=parts.runner), make_sequence(make_prompt(8))
        parts.runner.submit(sequence, held)
        await soon(held.held.wait())
        parts.runner.remove(sequence)
        parts.pool.check_idle()
        parts.runner.resume(sequence)
        assert parts.runner.idle
    assert len(held.tokens) == 3


async def test_a_held_sequence_ends_at_its_deadline_while_nothing_else_happens() -> None:
    clock = FakeClock()
    async with running_engine_loop(make_engine(), clock) as parts:
        held = Holding(runner=parts.runner)
        parts.runner.submit(make_sequence(make_prompt(8), deadline_at_s=5.0), held)
        await soon(held.held.wait())
        clock.advance(5.0)
        await soon(held.ended.wait())
        await until(lambda: parts.runner.idle)
        parts.pool.check_idle()
    assert isinstance(held.error, DeadlineExceeded)


async def test_a_held_sequence_is_not_preempted_and_who_preempts_itself_goes_on_later() -> None:
    old, young = make_prompt(8), make_prompt(8, seed=1)
    async with running_engine_loop(make_engine(6)) as parts:
        held = Holding(runner=parts.runner)
        sequence = make_sequence(young, name="young", arrived_at_s=2.0)
        parts.runner.submit(sequence, held)
        await soon(held.held.wait())
        other = parts.submit(make_sequence(old, name="old", max_tokens=16, arrived_at_s=1.0))
        await until(lambda: parts.runner.preemptions > 0)
        assert len(sequence.blocks) == 3
        parts.runner.resume(sequence)
        await soon(held.ended.wait())
        await soon(other.ended.wait())
        parts.pool.check_idle()
    assert held.tokens == expected_tokens(young, 8)
    assert other.tokens == expected_tokens(old, 16)


async def test_a_sequence_in_a_step_cannot_be_held() -> None:
    gate = StepGate()
    async with running_engine_loop(make_engine(sleep=gate)) as parts:
        sequence = make_sequence(make_prompt(8))
        heard = parts.submit(sequence)
        await until(gate.waiting.is_set, "a step in flight")
        with pytest.raises(InternalError):
            parts.runner.hold(sequence)
        gate.open()
        await soon(heard.ended.wait())


async def test_a_preempted_sequence_is_told_while_it_still_has_its_blocks() -> None:
    told: list[int] = []
    async with running_engine_loop(make_engine(10)) as parts:
        heard = []
        for i in range(3):
            sequence = make_sequence(
                make_prompt(8, seed=i), name=str(i), max_tokens=24, arrived_at_s=float(i)
            )
            sequence.on_preempted = lambda sequence=sequence: told.append(len(sequence.blocks))
            heard.append(parts.submit(sequence))
        for each in heard:
            await soon(each.ended.wait())
        assert len(told) == parts.runner.preemptions > 0
        assert all(told)


async def test_what_prefill_costs_is_learned_from_steps_that_only_prefill() -> None:
    async with running_engine_loop(make_engine(), step_tokens=16) as parts:
        heard = parts.submit(make_sequence(make_prompt(40)))
        await soon(heard.ended.wait())
        assert parts.runner.prefill_cost.observed_steps == 3


async def test_the_work_of_a_prompt_is_all_that_was_in_its_steps() -> None:
    async with running_engine_loop(make_engine(), step_tokens=32, chunk_tokens=16) as parts:
        prompts = [make_prompt(length, seed=length) for length in (40, 10, 5)]
        sequences = [make_sequence(p, name=str(len(p)), max_tokens=1) for p in prompts]
        heard = [parts.submit(sequence) for sequence in sequences]
        for each in heard:
            await soon(each.ended.wait())
        work = [parts.runner.work_of(sequence) for sequence in sequences]
    assert work[0].tokens == 55, "in 3 steps of 16 + 8 for the long one, the others in one of these"
    assert work[0].steps == 3
    alone = StepWork().plus([(0, 40), (0, 10), (0, 5)], steps=3)
    assert work[0] == alone


async def test_what_a_step_takes_of_a_prompt_beside_an_answer_is_learned_from_such_steps() -> None:
    clock = FakeClock()
    engine = make_engine(700, sleep=clock.advance)
    async with running_engine_loop(
        engine, clock, step_tokens=512, budget=StepBudget(0.014)
    ) as parts:
        answer = parts.submit(make_sequence(make_prompt(8), name="a", max_tokens=400))
        await until(lambda: bool(answer.tokens), "an answer that decodes")
        prompt = parts.submit(make_sequence(make_prompt(2200, seed=1), name="b", max_tokens=1))
        await soon(prompt.ended.wait())
        assert answer.finish is None, "it decoded all the while"
        await soon(answer.ended.wait())
    chunks = [b - a for a, b in pairwise([0, *prompt.computed])]
    assert chunks[:2] == [511, 511]
    assert all(180 < tokens < 320 for tokens in chunks[2:-1]), chunks


# -- load -----------------------------------------------------------------------------------------


async def test_load_counts_what_is_to_do() -> None:
    gate = StepGate()
    async with running_engine_loop(make_engine(8, sleep=gate), step_tokens=8) as parts:
        parts.submit(make_sequence(make_prompt(20), name="a", max_tokens=1))
        parts.submit(make_sequence(make_prompt(16, seed=1), name="b", max_tokens=1))
        await until(gate.waiting.is_set, "a step in flight")
        load = parts.runner.load()
        gate.open()
    assert (load.queued_tokens, load.waiting, load.running, load.context_tokens) == (36, 1, 1, 20)


async def test_load_tells_who_decodes() -> None:
    gate = StepGate()
    async with running_engine_loop(make_engine(64, sleep=gate), step_tokens=32) as parts:
        first = parts.submit(make_sequence(make_prompt(20), name="a", max_tokens=8))
        await until(gate.waiting.is_set, "a step in flight")
        assert (parts.runner.load().decoding, parts.runner.load().decoding_tokens) == (0, 0)
        parts.submit(make_sequence(make_prompt(50, seed=1), name="b", max_tokens=1))
        gate.allow(1)
        await until(lambda: len(first.tokens) == 1 and parts.runner.load().running == 2)
        load = parts.runner.load()
        assert (load.decoding, load.decoding_tokens, load.running) == (1, 21, 2)
        gate.open()


async def test_an_ended_loop_leaves_no_step_behind() -> None:
    gate = StepGate()
    gate.open()
    async with running_engine_loop(make_engine(sleep=gate)) as parts:
        heard = parts.submit(make_sequence(make_prompt(8), max_tokens=2))
        await soon(heard.ended.wait())
        counts = parts.pool.counts()
    assert counts == PoolCounts(free=62, cached=2, in_use=0, receiving=0, quarantined=0, held=0)
