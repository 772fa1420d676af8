"""A prefill worker that reads a prompt's prefix from another worker's cache, or does without."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import pytest

from cluster.worker.worker import WorkerSettings
from core.clock import Clock, FakeClock, SystemClock
from core.ids import Incarnation, Role, WorkerId
from core.messages import Cancel, KvEvents, KvStored, LegFailed, LegTimes, PrefixSource
from core.stages import Stage
from kv_transfer.loopback import LoopbackHub
from kv_transfer.reader import FetchedPrefix, FetchRequest
from prefill_worker.prefix import FetchCounters
from tests.builders import (
    BLOCK_BYTES,
    RouterEnd,
    ServedWorker,
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
WHOLE_BLOCKS = 5


@dataclass(slots=True)
class Duo:
    """A worker that has prefixes and one that may fetch them, with a router's end at each."""

    source: ServedWorker
    target: ServedWorker
    to_source: RouterEnd
    to_target: RouterEnd

    @property
    def hint(self) -> PrefixSource:
        return source_at(self.source)

    @property
    def fetches(self) -> FetchCounters:
        return self.target.worker.prefill.fetches

    async def warm(self, prompt: Sequence[int] = PROMPT) -> None:
        """The source computes a prompt and keeps it."""
        await answer(self.source, self.to_source, 1, prompt)

    async def ask(self, number: int, prompt: Sequence[int] = PROMPT, **fields: object) -> LegTimes:
        """The target answers rightly, with the source as hint unless told; the leg's times."""
        hinted = {"source": self.hint, **fields}
        return await answer(self.target, self.to_target, number, prompt, **hinted)

    def start(self, number: int, prompt: Sequence[int] = PROMPT, **fields: object) -> None:
        submit(self.target, self.to_target, number, prompt, **{"source": self.hint, **fields})

    def cancel(self, number: int) -> None:
        gone = Cancel(number=number, reason="no longer wanted")
        self.target.worker.handle(self.to_target.outlet, gone)

    async def idle(self) -> None:
        role = self.target.worker.prefill
        await until(lambda: role.pulls == role.pulling_tokens == 0, "no fetch under way")
        await until_idle(self.source.worker, self.target.worker)


@asynccontextmanager
async def duo(
    *,
    slow: bool = True,
    settings: WorkerSettings | None = None,
    clock: Clock | None = None,
    gated: bool = False,
) -> AsyncIterator[Duo]:
    """`slow`: the target has seen prefill steps that took long, so a fetch pays."""
    hub, settings = LoopbackHub(), settings or make_settings()
    async with (
        served_worker("source", Role.PREFILL, hub) as source,
        served_worker(
            "target", Role.PREFILL, hub, worker_settings=settings, clock=clock, gated=gated
        ) as target,
    ):
        if slow:
            for _ in range(20):
                target.worker.runner.prefill_cost.add([(0, 64)], 60.0)
        yield Duo(source, target, RouterEnd(source.worker), RouterEnd(target.worker))


def source_at(worker: ServedWorker, num_blocks: int = WHOLE_BLOCKS) -> PrefixSource:
    return PrefixSource(
        worker_id=worker.record.worker_id,
        address=worker.peer_address,
        incarnation=worker.record.incarnation,
        num_blocks=num_blocks,
    )


def submit(
    worker: ServedWorker, end: RouterEnd, number: int, prompt: Sequence[int], **fields: object
) -> None:
    made = prefill_submit(number, prompt, name=str(number), max_tokens=1)
    worker.worker.handle(end.outlet, replace(made, **fields))  # type: ignore[arg-type]


async def answer(
    worker: ServedWorker, end: RouterEnd, number: int, prompt: Sequence[int], **fields: object
) -> LegTimes:
    submit(worker, end, number, prompt, **fields)
    return await answered(end, number, prompt)


async def answered(end: RouterEnd, number: int, prompt: Sequence[int]) -> LegTimes:
    assert await end.answered(number) == expected_tokens(prompt, 1)
    times = end.entries(number)[0].times
    assert times is not None
    return times


@asynccontextmanager
async def silent_source() -> AsyncIterator[PrefixSource]:
    """A peer that takes connections and never says anything."""
    taken: list[asyncio.BaseTransport] = []

    class Silent(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            taken.append(transport)

    server = await asyncio.get_running_loop().create_server(Silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield replace(NOWHERE, address=f"127.0.0.1:{port}")
    finally:
        server.close()
        for transport in taken:
            transport.close()
        await asyncio.sleep(0)  # the loop closes their sockets in its next turn


NOWHERE = PrefixSource(
    worker_id=WorkerId("gone"),
    address="127.0.0.1:1",
    incarnation=Incarnation("gone"),
    num_blocks=WHOLE_BLOCKS,
)


# -- what a fetch brings ------------------------------------------------------------------------


async def test_a_prefix_is_read_instead_of_computed() -> None:
    async with duo() as pair:
        await pair.warm()
        times = await pair.ask(1)
        assert (times.cached_tokens, times.fetched_tokens) == (20, 20)
        assert (times.transfer_blocks, times.transfer_bytes) == (5, 5 * BLOCK_BYTES)
        assert times.transfer_s > 0
        assert times.queue_s >= 0
        assert (pair.fetches.tried, pair.fetches.won, pair.fetches.tokens) == (1, 1, 20)
        await pair.idle()


async def test_only_what_is_missing_is_read() -> None:
    async with duo() as pair:
        await pair.warm()
        await pair.ask(1, PROMPT[:9], source=None)
        times = await pair.ask(2)
        assert (times.cached_tokens, times.fetched_tokens) == (20, 12)
        assert times.transfer_bytes == 3 * BLOCK_BYTES
        await pair.idle()


async def test_a_fetched_prefix_is_there_for_the_next_prompt_and_the_routers_hear_of_it() -> None:
    async with duo() as pair:
        await pair.warm()
        await pair.ask(1)
        times = await pair.ask(2)
        assert (times.cached_tokens, times.fetched_tokens) == (20, 0)
        assert (pair.fetches.tried, pair.fetches.skipped["nothing_missing"]) == (1, 1)
        stored = [
            block_hash
            for message in pair.to_target.of(KvEvents)
            for event in message.events
            if isinstance(event, KvStored)
            for block_hash in event.hashes
        ]
        assert stored == pair.target.worker.pool.hashes()
        assert len(stored) == WHOLE_BLOCKS


async def test_a_prompt_of_whole_blocks_still_computes_its_last_one() -> None:
    prompt = make_prompt(20)
    async with duo() as pair:
        await pair.warm(prompt)
        assert (await pair.ask(1, prompt)).fetched_tokens == 16
        await pair.idle()


async def test_another_tenant_s_prefix_is_not_the_same() -> None:
    async with duo() as pair:
        await pair.warm()
        assert (await pair.ask(1, cache_salt="other")).fetched_tokens == 0
        assert pair.fetches.failed == {"not_held": 1}


async def test_prompts_that_want_the_same_prefix_share_one_fetch() -> None:
    async with duo() as pair:
        await pair.warm()
        prompts = [(*PROMPT, tail, tail) for tail in range(5)]
        for number, prompt in enumerate(prompts):
            pair.start(number, prompt)
        assert pair.target.worker.prefill.pulls == 0
        all_times = [
            await answered(pair.to_target, number, prompt) for number, prompt in enumerate(prompts)
        ]
        assert [times.cached_tokens for times in all_times] == [20] * 5
        assert sorted(times.fetched_tokens for times in all_times) == [0] * 4 + [20]
        assert (pair.fetches.tried, pair.fetches.shared) == (1, 4)
        await pair.idle()


async def test_while_it_waits_a_prompt_counts_as_load() -> None:
    async with duo() as pair, silent_source() as silent:
        pair.start(1, source=replace(silent, num_blocks=4))
        await until(lambda: pair.target.worker.prefill.pulls == 1)
        load = pair.target.worker.load()
        assert (load.waiting, load.queued_tokens) == (1, 6)
        await answered(pair.to_target, 1, PROMPT)
        await pair.idle()


async def test_a_decode_worker_s_answer_is_read_for_the_next_turn() -> None:
    """Turn 2 of a chat finds the prompt and the answer of turn 1 at the worker that decoded it."""
    async with worker_pair() as pair:
        handoff = await pair.start_prefill(1, PROMPT, name="turn 1", max_tokens=15)
        await pair.start_decode(1, PROMPT, handoff, name="turn 1", max_tokens=15)
        await pair.to_decode.answered(1)
        await pair.idle()
        chat = (*PROMPT, *expected_tokens(PROMPT, 15), *make_prompt(9, seed=2))
        pair.prefill.worker.runner.prefill_cost.add([(0, 64)], 60.0)
        times = await answer(
            pair.prefill, pair.to_prefill, 2, chat, source=source_at(pair.decode, num_blocks=9)
        )
        # 36 of the 37 tokens of turn 1 have KV, the last one was never fed
        assert times.cached_tokens == 36
        assert times.fetched_tokens == 36 - 20
        assert times.transfer_bytes == 4 * BLOCK_BYTES
        await pair.idle()


# -- when a fetch is not tried --------------------------------------------------------------------


async def test_without_a_measured_prefill_nothing_is_fetched() -> None:
    async with duo(slow=False) as pair:
        await pair.warm()
        assert (await pair.ask(1)).fetched_tokens == 0
        assert pair.fetches.skipped == {"unmeasured": 1}


async def test_a_prefill_that_takes_no_time_is_not_replaced_by_a_fetch() -> None:
    async with duo(slow=False, clock=FakeClock()) as pair:
        await pair.warm()
        await pair.ask(1, make_prompt(64, seed=3), source=None)
        assert (await pair.ask(2)).fetched_tokens == 0
        assert pair.fetches.skipped == {"slower": 1}
        assert pair.fetches.tried == 0


async def test_fetching_can_be_switched_off() -> None:
    settings = make_settings()
    off = replace(settings, transfer=settings.transfer.model_copy(update={"fetch": False}))
    async with duo(settings=off) as pair:
        await pair.warm()
        assert (await pair.ask(1)).fetched_tokens == 0
        assert pair.fetches.skipped == {"off": 1}


# -- when a fetch fails ---------------------------------------------------------------------------


async def test_a_source_that_has_evicted_the_prefix_costs_a_question_and_is_asked_again() -> None:
    async with duo() as pair:
        assert (await pair.ask(1)).fetched_tokens == 0
        assert pair.fetches.failed == {"not_held": 1}
        await pair.warm(make_prompt(22, seed=4))
        assert (await pair.ask(2, make_prompt(22, seed=4))).fetched_tokens == 20


async def test_a_source_that_is_gone_is_left_alone_for_a_while() -> None:
    async with duo() as pair:
        assert (await pair.ask(1, source=NOWHERE)).fetched_tokens == 0
        await pair.ask(2, make_prompt(22, seed=5), source=NOWHERE)
        assert sum(pair.fetches.failed.values()) == pair.fetches.tried == 1
        assert pair.fetches.skipped == {"avoided": 1}
        other = make_prompt(22, seed=7)
        await pair.warm(other)
        assert (await pair.ask(3, other)).fetched_tokens == 20


async def test_a_source_that_was_restarted_is_not_read() -> None:
    async with duo() as pair:
        await pair.warm()
        before = replace(pair.hint, incarnation=Incarnation("before"))
        assert (await pair.ask(1, source=before)).fetched_tokens == 0
        assert pair.fetches.failed == {"owner_restarted": 1}


async def test_a_silent_source_costs_a_bounded_pause_for_all_who_want_it() -> None:
    clock = SystemClock()
    async with duo() as pair, silent_source() as silent:
        began_s = clock.now_s()
        for number in range(3):
            pair.start(number, source=silent)
        for number in range(3):
            assert (await answered(pair.to_target, number, PROMPT)).fetched_tokens == 0
        assert clock.now_s() - began_s < 2.0
        assert (pair.fetches.tried, pair.fetches.shared) == (1, 2)
        assert pair.fetches.failed == {"deadline": 1}
        await pair.idle()


async def test_no_memory_for_a_prefix_now_means_to_wait_for_it_and_compute() -> None:
    async with duo(settings=make_settings(num_blocks=8), gated=True) as pair:
        await pair.warm()
        pair.start(1, make_prompt(20, seed=6), source=None)
        pair.start(2)
        await until(lambda: pair.fetches.failed == {"no_memory": 1})
        pair.target.gate.open()
        assert (await answered(pair.to_target, 2, PROMPT)).fetched_tokens == 0
        await pair.idle()


async def test_a_prompt_whose_deadline_passes_during_its_fetch_fails_with_that() -> None:
    async with duo() as pair, silent_source() as silent:
        pair.start(1, source=silent, deadline_s=0.1)
        failed = await pair.to_target.first(LegFailed)
        assert (failed.code, failed.stage) == ("deadline_exceeded", Stage.PREFILL)
        await pair.ask(2, source=silent)
        assert pair.fetches.tried == 2  # the source was not to blame
        await pair.idle()


async def test_a_damaged_prefix_fails_the_leg_instead_of_changing_its_text() -> None:
    async with duo() as pair:
        await pair.warm()
        pair.source.engine.arena.data[:] = 0
        pair.start(1)
        failed = await pair.to_target.first(LegFailed)
        assert (failed.number, failed.code) == (1, "kv_mismatch")
        await pair.ask(2, source=None)
        await pair.idle()


async def test_a_bug_in_a_fetch_fails_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_request: FetchRequest) -> FetchedPrefix:
        raise RuntimeError("a bug")

    async with duo() as pair:
        monkeypatch.setattr(pair.target.worker.reader, "fetch", broken)
        assert (await pair.ask(1)).fetched_tokens == 0
        assert pair.fetches.failed == {"bug": 1}
        await pair.idle()


# -- cancel -------------------------------------------------------------------------------------


async def test_a_cancel_during_a_fetch_leaves_nothing_behind() -> None:
    async with duo() as pair, silent_source() as silent:
        pair.start(1, source=silent)
        await until(lambda: pair.target.worker.prefill.pulls == 1)
        pair.cancel(1)
        assert pair.target.worker.open_legs == 0
        await pair.idle()
        await until(lambda: pair.fetches.failed == {"cancelled": 1})
        await pair.to_target.all_said()
        assert pair.to_target.entries(1) == []
        assert pair.to_target.of(LegFailed) == []


async def test_a_cancelled_fetch_is_done_by_one_of_those_that_waited_for_it() -> None:
    async with duo() as pair, silent_source() as silent:
        await pair.warm()
        pair.start(1, source=silent)
        pair.start(2)
        pair.start(3)
        await until(lambda: pair.fetches.shared == 2)
        pair.cancel(1)
        all_times = [await answered(pair.to_target, number, PROMPT) for number in (2, 3)]
        assert sorted(times.fetched_tokens for times in all_times) == [0, 20]
        assert (pair.fetches.tried, pair.fetches.won) == (2, 1)
        await pair.idle()


async def test_a_cancel_before_the_fetch_has_begun_leaves_nothing_behind() -> None:
    async with duo() as pair:
        await pair.warm()
        pair.start(1)
        pair.cancel(1)
        await pair.idle()
        assert pair.fetches.tried == 0


async def test_a_lost_router_ends_a_fetch() -> None:
    async with duo() as pair, silent_source() as silent:
        pair.start(1, source=silent)
        await until(lambda: pair.target.worker.prefill.pulls == 1)
        pair.target.worker.detach(pair.to_target.outlet)
        assert pair.target.worker.open_legs == 0
        await pair.idle()


async def test_a_worker_that_stops_ends_its_fetches() -> None:
    async with silent_source() as silent, duo() as pair:
        pair.start(1, source=silent)
        await until(lambda: pair.target.worker.prefill.pulls == 1)
