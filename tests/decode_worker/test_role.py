"""The decode role inside a whole worker, with a real prefill worker to pull from."""

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from core.ids import Incarnation, LeaseId
from core.messages import Cancel, LegFailed, Rejected
from core.sampling import FinishReason
from core.stages import Stage
from engine import scheduler
from kv_transfer import reader
from tests.builders import (
    BLOCK_BYTES,
    WorkerPair,
    decode_submit,
    expected_tokens,
    make_prompt,
    make_settings,
    until,
    until_idle,
    worker_pair,
)

PROMPT = make_prompt(22)
CHUNKED = make_settings(step_tokens=8)


def cancel(pair: WorkerPair, number: int) -> None:
    message = Cancel(number=number, reason="no longer wanted")
    pair.decode.worker.handle(pair.to_decode.outlet, message)


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 22, 100])
async def test_a_hand_off_continues_the_text(num_tokens: int) -> None:
    prompt = make_prompt(num_tokens)
    async with worker_pair(worker_settings=CHUNKED) as pair:
        handoff = await pair.start_prefill(1, prompt, max_tokens=12)
        await pair.start_decode(1, prompt, handoff, max_tokens=12)
        assert await pair.to_decode.answered(1) == expected_tokens(prompt, 12)[1:]
        await pair.idle()


async def test_the_first_frame_says_what_was_moved() -> None:
    async with worker_pair() as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        await pair.start_decode(1, PROMPT, handoff)
        await pair.to_decode.answered(1)
        first, *rest = pair.to_decode.entries(1)
        assert first.times is not None
        assert first.times.transfer_blocks == 6
        assert first.times.transfer_bytes == 6 * BLOCK_BYTES
        assert all(entry.times is None for entry in rest)


async def test_blocks_held_already_are_not_moved_again() -> None:
    async with worker_pair() as pair:
        for number in (1, 2):
            handoff = await pair.start_prefill(number, PROMPT, name=str(number))
            await pair.start_decode(number, PROMPT, handoff, name=str(number))
            assert await pair.to_decode.answered(number) == expected_tokens(PROMPT, 8)[1:]
        times = pair.to_decode.entries(2)[0].times
        assert times is not None
        assert (times.transfer_blocks, times.cached_tokens) == (1, 20)
        await pair.idle()


async def test_without_a_hand_off_the_kv_is_computed_here() -> None:
    async with worker_pair() as pair:
        await pair.start_decode(1, PROMPT, None)
        assert await pair.to_decode.answered(1) == expected_tokens(PROMPT, 8)
        await pair.idle()


async def test_many_sequences_decode_together() -> None:
    prompts = [make_prompt(5 + 3 * i, seed=i) for i in range(6)]
    async with worker_pair(worker_settings=CHUNKED) as pair:
        for i, prompt in enumerate(prompts):
            handoff = await pair.start_prefill(i, prompt, name=str(i), max_tokens=20)
            await pair.start_decode(i, prompt, handoff, name=str(i), max_tokens=20)
        for i, prompt in enumerate(prompts):
            assert await pair.to_decode.answered(i) == expected_tokens(prompt, 20)[1:]
        await pair.idle()


async def test_preemption_in_a_small_arena_keeps_the_text() -> None:
    prompts = [make_prompt(8, seed=i) for i in range(3)]
    async with worker_pair(worker_settings=make_settings(num_blocks=12)) as pair:
        for i, prompt in enumerate(prompts):
            handoff = await pair.start_prefill(i, prompt, name=str(i), max_tokens=30)
            await pair.start_decode(i, prompt, handoff, name=str(i), max_tokens=30)
        for i, prompt in enumerate(prompts):
            assert await pair.to_decode.answered(i) == expected_tokens(prompt, 30)[1:]
        await pair.idle()


async def test_a_pull_that_waits_for_memory_goes_on_when_a_sequence_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reader, "_SPACE_RECHECK_S", 1_000.0)
    prompts = [make_prompt(24, seed=i) for i in range(3)]
    async with worker_pair(worker_settings=make_settings(num_blocks=12)) as pair:
        for i, prompt in enumerate(prompts):
            handoff = await pair.start_prefill(i, prompt, name=str(i), max_tokens=16)
            await pair.start_decode(i, prompt, handoff, name=str(i), max_tokens=16)
        for i, prompt in enumerate(prompts):
            assert await pair.to_decode.answered(i) == expected_tokens(prompt, 16)[1:]
        await pair.idle()


async def test_pulls_leave_the_memory_that_a_sequence_has_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scheduler, "_OVERTAKEN_S", 0.0)
    async with worker_pair(worker_settings=make_settings(num_blocks=16), gated_decode=True) as pair:

        async def pulled(number: int, max_tokens: int) -> None:
            prompt = make_prompt(12, seed=number)
            handoff = await pair.start_prefill(number, prompt, name=str(number))
            await pair.start_decode(
                number, prompt, handoff, name=str(number), max_tokens=max_tokens
            )

        for number, max_tokens in ((1, 8), (2, 12), (3, 16)):
            await pulled(number, max_tokens)
        await until(lambda: pair.decode.worker.runner.running == 3, "three running")
        await pair.start_decode(4, make_prompt(48), None, max_tokens=2)
        for number in (5, 6):
            await pulled(number, 16)
        runner = pair.decode.worker.runner
        for step in range(runner.steps + 1, runner.steps + 40):
            pair.decode.gate.allow(1)
            await until(lambda step=step: runner.steps >= step, "a step")  # type: ignore[misc]
            await pair.to_decode.all_said()
            if pair.to_decode.tokens(4):
                break
            assert not pair.to_decode.tokens(5), "it came later and got the memory first"
        pair.decode.gate.open()
        for number in (5, 6):
            await pair.to_decode.answered(number)
        await pair.idle()


async def test_an_answer_that_ended_with_its_first_token_ends_the_leg_in_silence() -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True) as pair:
        stop = expected_tokens(PROMPT, 1)
        handoff = await pair.start_prefill(1, PROMPT, stop_token_ids=stop)
        await pair.start_decode(1, PROMPT, handoff)
        lease = pair.prefill.worker.leases.get(handoff.lease_id)
        await until(lambda: lease is not None and lease.reader is not None, "bound")
        pair.prefill.gate.open()
        await pair.to_prefill.answered(1)
        assert pair.to_prefill.entries(1)[0].finish is FinishReason.STOP
        await pair.idle()
        await pair.to_decode.all_said()
        assert pair.to_decode.entries(1) == []
        assert pair.to_decode.of(LegFailed) == []


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "code"),
    [
        (0, 8, "invalid_request"),
        (8, 0, "invalid_request"),
        (1020, 5, "invalid_request"),
        (8, 8, "overloaded"),
    ],
)
async def test_a_sequence_that_cannot_be_taken_is_rejected_and_holds_nothing(
    num_tokens: int, max_tokens: int, code: str
) -> None:
    async with worker_pair(
        worker_settings=make_settings(max_sequences=1), gated_decode=True
    ) as pair:
        await pair.start_decode(1, PROMPT, None)
        submit = decode_submit(2, make_prompt(num_tokens), None, max_tokens=max_tokens)
        pair.decode.worker.handle(pair.to_decode.outlet, submit)
        rejected = await pair.to_decode.first(Rejected)
        assert (rejected.number, rejected.code) == (2, code)
        assert pair.decode.worker.open_legs == 1


@pytest.mark.parametrize(
    "change",
    [{"lease_id": LeaseId(99)}, {"owner_incarnation": Incarnation("before")}],
    ids=["unknown lease", "restarted owner"],
)
async def test_a_pull_that_fails_fails_its_leg(change: dict[str, object]) -> None:
    async with worker_pair() as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        wrong = replace(handoff, **change)  # type: ignore[arg-type]
        await pair.start_decode(1, PROMPT, wrong)
        failed = await pair.to_decode.first(LegFailed)
        assert (failed.code, failed.stage) == ("kv_transfer_failed", Stage.KV_TRANSFER)
        await until_idle(pair.decode.worker)


async def test_kv_damaged_on_its_way_fails_the_leg_instead_of_changing_the_text() -> None:
    async with worker_pair(gated_prefill=True) as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        lease = pair.prefill.worker.leases.get(handoff.lease_id)
        assert lease is not None
        pair.prefill.gate.open()
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(1)))
        pair.prefill.engine.arena.data[lease.blocks[3]] = 0
        await pair.start_decode(1, PROMPT, handoff)
        failed = await pair.to_decode.first(LegFailed)
        assert (failed.code, failed.stage) == ("kv_mismatch", Stage.DECODE)
        await pair.idle()
        await pair.to_decode.all_said()
        assert pair.to_decode.tokens(1) == []


# -- cancel at every stage ----------------------------------------------------------------------


async def pulling(pair: WorkerPair) -> None:
    """The first chunk is there, later ones still run."""
    handoff = await pair.start_prefill(1, PROMPT)
    await pair.start_decode(1, PROMPT, handoff)
    pair.prefill.gate.allow(1)
    await until(lambda: pair.decode.worker.pool.counts().receiving > 0, "a read")


async def bound(pair: WorkerPair) -> None:
    """Bound to the lease, nothing announced yet."""
    handoff = await pair.start_prefill(1, PROMPT)
    await pair.start_decode(1, PROMPT, handoff)
    lease = pair.prefill.worker.leases.get(handoff.lease_id)
    await until(lambda: lease is not None and lease.reader is not None, "bound")


async def just_submitted(pair: WorkerPair) -> None:
    handoff = await pair.start_prefill(1, PROMPT)
    await pair.start_decode(1, PROMPT, handoff)


async def decoding(pair: WorkerPair) -> None:
    """Some tokens are out, a step is in flight."""
    pair.prefill.gate.open()
    handoff = await pair.start_prefill(1, PROMPT, max_tokens=100)
    await pair.start_decode(1, PROMPT, handoff, max_tokens=100)
    pair.decode.gate.allow(3)
    await pair.to_decode.until(lambda: len(pair.to_decode.tokens(1)) == 3)
    await until(pair.decode.gate.waiting.is_set, "a step in flight")


async def computing(pair: WorkerPair) -> None:
    """No hand-off: the prompt is half computed here."""
    await pair.start_decode(1, PROMPT, None)
    pair.decode.gate.allow(1)
    await until(lambda: bool(pair.decode.worker.pool.hashes()), "a chunk")


STAGES = [just_submitted, bound, pulling, decoding, computing]


@pytest.mark.parametrize("reach", STAGES)
async def test_a_cancelled_leg_leaves_both_workers_idle(
    reach: Callable[[WorkerPair], Awaitable[None]],
) -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True, gated_decode=True) as pair:
        await reach(pair)
        said = len(pair.to_decode.tokens(1))
        cancel(pair, 1)
        assert pair.decode.worker.open_legs == 0
        pair.prefill.worker.handle(pair.to_prefill.outlet, Cancel(number=1, reason="as well"))
        assert pair.prefill.worker.open_legs == 0
        pair.prefill.gate.open()
        pair.decode.gate.open()
        await pair.idle()
        await pair.to_decode.all_said()
        assert len(pair.to_decode.tokens(1)) == said
        assert pair.to_decode.of(LegFailed) == []


@pytest.mark.parametrize("reach", STAGES)
async def test_a_lost_router_ends_its_legs_at_once(
    reach: Callable[[WorkerPair], Awaitable[None]],
) -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True, gated_decode=True) as pair:
        await reach(pair)
        pair.decode.worker.detach(pair.to_decode.outlet)
        pair.prefill.worker.detach(pair.to_prefill.outlet)
        assert pair.decode.worker.open_legs == pair.prefill.worker.open_legs == 0
        pair.prefill.gate.open()
        pair.decode.gate.open()
        await pair.idle()
