"""The prefill role inside a whole worker, spoken to as a router speaks to it."""

import asyncio

import pytest

from core.clock import FakeClock
from core.ids import Role
from core.messages import Cancel, LegFailed, Rejected, RenewLeases, Withdraw, Withdrawn
from core.sampling import FinishReason
from core.stages import Stage
from kv_transfer.loopback import LoopbackHub
from kv_transfer.metrics import LeaseEnd
from tests.builders import (
    RouterEnd,
    WorkerPair,
    decode_submit,
    expected_tokens,
    make_prompt,
    make_settings,
    prefill_submit,
    served_worker,
    until,
    until_idle,
    worker_pair,
)

PROMPT = make_prompt(22)
CHUNKED = make_settings(step_tokens=8)


def cancel(pair: WorkerPair, number: int) -> None:
    message = Cancel(number=number, reason="no longer wanted")
    pair.prefill.worker.handle(pair.to_prefill.outlet, message)


async def test_an_accepted_prompt_has_a_lease_of_known_length() -> None:
    async with worker_pair(worker_settings=make_settings(lease_s=7.5)) as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        accepted = await pair.to_prefill.accepted(1)
        assert accepted.lease_s == 7.5
        assert pair.prefill.worker.leases.get(handoff.lease_id) is not None


async def test_the_first_token_goes_to_the_router_with_its_times() -> None:
    async with worker_pair() as pair:
        await pair.start_prefill(1, PROMPT)
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(1)))
        (entry,) = pair.to_prefill.entries(1)
        assert list(entry.tokens) == expected_tokens(PROMPT, 1)
        assert entry.finish is None
        assert entry.times is not None
        assert entry.times.cached_tokens == 0


async def test_a_prompt_seen_before_is_answered_from_the_cache() -> None:
    async with worker_pair() as pair:
        for number in (1, 2):
            await pair.start_prefill(number, PROMPT, name=str(number))
            await pair.to_prefill.until(lambda n=number: bool(pair.to_prefill.entries(n)))  # type: ignore[misc]
        (entry,) = pair.to_prefill.entries(2)
        assert list(entry.tokens) == expected_tokens(PROMPT, 1)
        assert entry.times is not None
        assert entry.times.cached_tokens == 20


async def test_the_lease_grows_with_every_chunk_and_ends_with_the_partial_block() -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True) as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        lease = pair.prefill.worker.leases.get(handoff.lease_id)
        assert lease is not None
        for blocks in (2, 4, 6):
            pair.prefill.gate.allow(1)
            await until(lambda n=blocks: len(lease.blocks) == n)  # type: ignore[misc]
            assert (lease.tokens is not None) == (blocks == 6)


async def test_an_answer_of_one_token_leaves_no_lease() -> None:
    async with worker_pair() as pair:
        await pair.start_prefill(1, PROMPT, max_tokens=1)
        assert await pair.to_prefill.answered(1) == expected_tokens(PROMPT, 1)
        assert pair.to_prefill.entries(1)[0].finish is FinishReason.LENGTH
        await until_idle(pair.prefill.worker)
        assert pair.prefill.worker.leases.counters.ended[LeaseEnd.CLOSED] == 1


async def test_a_stop_token_as_first_token_leaves_no_lease() -> None:
    async with worker_pair() as pair:
        await pair.start_prefill(1, PROMPT, stop_token_ids=expected_tokens(PROMPT, 1))
        await pair.to_prefill.answered(1)
        assert pair.to_prefill.entries(1)[0].finish is FinishReason.STOP
        await until_idle(pair.prefill.worker)


@pytest.mark.parametrize(
    ("num_tokens", "code"), [(0, "invalid_request"), (1025, "invalid_request"), (200, "overloaded")]
)
async def test_a_prompt_that_cannot_be_taken_is_rejected_and_holds_nothing(
    num_tokens: int, code: str
) -> None:
    limits = make_settings(max_queued_tokens=100)
    async with worker_pair(worker_settings=limits, gated_prefill=True) as pair:
        await pair.start_prefill(1, make_prompt(50))
        submit = prefill_submit(2, make_prompt(num_tokens))
        pair.prefill.worker.handle(pair.to_prefill.outlet, submit)
        rejected = await pair.to_prefill.first(Rejected)
        assert (rejected.number, rejected.code) == (2, code)
        assert pair.prefill.worker.open_legs == 1


async def test_the_prompts_held_are_bounded_until_their_leases_end() -> None:
    async with worker_pair(worker_settings=make_settings(max_legs=2)) as pair:
        handoff = await pair.start_prefill(1, PROMPT, name="1")
        await pair.start_prefill(2, PROMPT, name="2")
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(2)))
        pair.prefill.worker.handle(pair.to_prefill.outlet, prefill_submit(3, PROMPT))
        rejected = await pair.to_prefill.first(Rejected)
        assert (rejected.number, rejected.code) == (3, "overloaded")
        await pair.start_decode(1, PROMPT, handoff, name="1")
        assert len(await pair.to_decode.answered(1)) == 7
        await until(lambda: pair.prefill.worker.open_legs == 1, "the end of a lease")
        await pair.start_prefill(4, PROMPT, name="4")
        cancel(pair, 2)
        cancel(pair, 4)
        await pair.idle()


async def test_a_waiting_prompt_can_be_cancelled() -> None:
    async with worker_pair(worker_settings=make_settings(num_blocks=8), gated_prefill=True) as pair:
        await pair.start_prefill(1, PROMPT)
        await pair.start_prefill(2, make_prompt(20, seed=1), name="waits")
        cancel(pair, 2)
        assert pair.prefill.worker.open_legs == 1
        cancel(pair, 1)
        pair.prefill.gate.open()
        await until_idle(pair.prefill.worker)


async def test_a_prompt_half_computed_can_be_cancelled() -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True) as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        lease = pair.prefill.worker.leases.get(handoff.lease_id)
        assert lease is not None
        pair.prefill.gate.allow(1)
        await until(lambda: len(lease.blocks) == 2)
        cancel(pair, 1)
        pair.prefill.gate.open()
        await until_idle(pair.prefill.worker)
        await pair.to_prefill.all_said()
        assert pair.to_prefill.entries(1) == []


async def test_a_cancel_after_the_first_token_ends_the_lease() -> None:
    async with worker_pair() as pair:
        await pair.start_prefill(1, PROMPT)
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(1)))
        assert pair.prefill.worker.pool.counts().held == 6
        cancel(pair, 1)
        await until_idle(pair.prefill.worker)
        assert pair.prefill.worker.leases.counters.ended[LeaseEnd.ABORTED] == 1


async def test_cancelling_a_leg_that_is_not_there_does_nothing() -> None:
    async with worker_pair() as pair:
        await pair.start_prefill(1, PROMPT)
        cancel(pair, 99)
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(1)))


async def test_a_lease_nobody_takes_expires() -> None:
    clock = FakeClock()
    async with worker_pair(clock=clock) as pair:
        await pair.start_prefill(1, PROMPT)
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(1)))
        clock.advance(10.0)
        await until_idle(pair.prefill.worker)
        assert pair.prefill.worker.leases.counters.ended[LeaseEnd.EXPIRED] == 1


async def test_the_router_keeps_a_lease_nobody_took_yet() -> None:
    clock = FakeClock()
    async with worker_pair(clock=clock) as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(1)))
        clock.advance(9.0)
        renew = RenewLeases(lease_ids=(handoff.lease_id,))
        pair.prefill.worker.handle(pair.to_prefill.outlet, renew)
        clock.advance(9.0)
        pair.prefill.worker.owner.sweep()
        assert pair.prefill.worker.leases.get(handoff.lease_id) is not None


async def test_a_prompt_past_its_deadline_fails_and_ends_its_lease() -> None:
    clock = FakeClock()
    async with worker_pair(worker_settings=CHUNKED, clock=clock, gated_prefill=True) as pair:
        await pair.start_prefill(1, PROMPT, deadline_s=3.0)
        pair.prefill.gate.allow(1)
        clock.advance(3.0)
        failed = await pair.to_prefill.first(LegFailed)
        assert (failed.code, failed.stage) == ("deadline_exceeded", Stage.PREFILL)
        pair.prefill.gate.open()
        await until_idle(pair.prefill.worker)


async def test_a_prompt_whose_cached_kv_is_damaged_fails_and_ends_its_lease() -> None:
    async with worker_pair() as pair:
        await pair.start_prefill(1, PROMPT, max_tokens=1)
        await pair.to_prefill.answered(1)
        pair.prefill.engine.arena.data[:] = 0
        await pair.start_prefill(2, PROMPT, name="again")
        failed = await pair.to_prefill.first(LegFailed)
        assert (failed.number, failed.code) == (2, "kv_mismatch")
        await until_idle(pair.prefill.worker)


async def test_a_prompt_that_has_not_begun_is_withdrawn_and_holds_nothing() -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True) as pair:
        await pair.start_prefill(1, PROMPT)
        pair.prefill.gate.allow(1)
        await until(lambda: pair.prefill.worker.runner.steps == 1)
        await pair.start_prefill(2, make_prompt(22, seed=1), name="2")
        for number in (1, 2):
            pair.prefill.worker.handle(pair.to_prefill.outlet, Withdraw(number=number))
        await pair.to_prefill.all_said()
        assert pair.to_prefill.of(Withdrawn) == [Withdrawn(number=2)]
        pair.prefill.gate.open()
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(1)))
        assert pair.to_prefill.tokens(1) == expected_tokens(PROMPT, 1)
        cancel(pair, 1)
        await pair.idle()


async def test_the_decode_worker_of_a_withdrawn_prompt_counts_no_fault_of_the_owner() -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True) as pair:
        await pair.start_prefill(1, PROMPT)
        handoff = await pair.start_prefill(2, make_prompt(22, seed=1), name="2")
        await pair.start_decode(2, make_prompt(22, seed=1), handoff, name="2")
        lease = pair.prefill.worker.leases.get(handoff.lease_id)
        assert lease is not None
        await until(lambda: lease.reader is not None, "the decode worker bound")
        pair.prefill.worker.handle(pair.to_prefill.outlet, Withdraw(number=2))
        failed = await pair.to_decode.first(LegFailed)
        assert "the router withdrew it" in failed.message
        (transfers,) = pair.decode.worker.reader.metrics.pairs.values()
        assert transfers.failures == {"withdrawn": 1}
        ended = pair.prefill.worker.leases.counters.by_reader[pair.decode.record.worker_id]
        assert ended == {LeaseEnd.WITHDRAWN: 1}
        cancel(pair, 1)
        pair.prefill.gate.open()
        await pair.idle()


async def test_a_prompt_finds_what_the_one_before_it_has_computed_meanwhile() -> None:
    async with worker_pair(worker_settings=CHUNKED, gated_prefill=True) as pair:
        for number in (1, 2):
            await pair.start_prefill(number, PROMPT, name=str(number))
        pair.prefill.gate.open()
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.entries(2)))
        (entry,) = pair.to_prefill.entries(2)
        assert entry.times is not None
        # It does not begin beside the last chunk of the first one, of which it needs all.
        assert entry.times.cached_tokens == 20
        assert pair.to_prefill.tokens(2) == expected_tokens(PROMPT, 1)
        for number in (1, 2):
            cancel(pair, number)
        await pair.idle()


async def test_a_preempted_prompt_goes_on_though_whoever_preempted_it_is_before_it() -> None:
    """Its lease keeps what it announced, and the answer that took the rest needs more than is left:
    neither would go on before a deadline.
    """
    settings = make_settings(num_blocks=16, step_tokens=4)
    async with served_worker("p", Role.PREFILL, LoopbackHub(), worker_settings=settings) as served:
        end = RouterEnd(served.worker)
        answer = decode_submit(1, make_prompt(16, 1), None, name="answer", max_tokens=40)
        served.worker.handle(end.outlet, answer)
        await asyncio.sleep(0)
        for number, length in ((2, 40), (3, 8)):
            prompt = make_prompt(length, number)
            served.worker.handle(end.outlet, prefill_submit(number, prompt, name=str(number)))
        await end.until(lambda: len(end.tokens(2)) == 1)
        assert served.worker.runner.preemptions > 0
        assert len(end.tokens(1)) < 40
        served.worker.handle(end.outlet, Cancel(number=2, reason="its KV was read"))
        await end.until(lambda: len(end.tokens(1)) == 40 and len(end.tokens(3)) == 1)
