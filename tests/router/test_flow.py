"""The whole way of a request over real gRPC, 2 + 2 workers in this process; faults at every hop."""

import asyncio
import gc
import logging
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Literal

import pytest

from core.clock import SystemClock
from core.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NoWorkers,
    Overloaded,
    Unavailable,
    WorkerFailed,
    WorkerLost,
)
from core.ids import Incarnation, Role, WorkerId
from core.sampling import FinishReason
from engine.types import SeqStep
from kv_transfer.metrics import LeaseEnd
from router.attempt import Attempt
from router.config import RouterConfig
from router.policies.base import Decision, DecodeQuery, Slo, Stateless
from router.types import Enough, Generated, GenerateRequest
from tests.builders import (
    BLOCK_BYTES,
    Cluster,
    ServedWorker,
    expected_tokens,
    make_prompt,
    make_request,
    make_settings,
    running_cluster,
    served_worker,
    soon,
    until,
    until_idle,
)

PROMPT = make_prompt(22)


async def generate(cluster: Cluster, request: GenerateRequest) -> list[Generated]:
    async def collect() -> list[Generated]:
        return [item async for item in cluster.flow.generate(request)]

    async with asyncio.timeout(20):
        return await collect()


def tokens(items: list[Generated]) -> list[int]:
    return [token for item in items for token in item.tokens]


def busy(workers: list[ServedWorker]) -> list[ServedWorker]:
    return [served for served in workers if served.worker.open_legs]


class Reading:
    """A client that reads a generator as a task, so that a test can act in the middle."""

    def __init__(self, group: asyncio.TaskGroup, cluster: Cluster, request: GenerateRequest):
        self.items: list[Generated] = []
        self.task = group.create_task(self._read(cluster.flow.generate(request)))

    async def _read(self, generated: AsyncGenerator[Generated, None]) -> None:
        async with aclosing(generated):
            async for item in generated:
                self.items.append(item)

    async def said(self, count: int) -> None:
        await until(lambda: len(tokens(self.items)) >= count, f"{count} tokens")

    async def ended(self) -> list[int]:
        await soon(self.task)
        return tokens(self.items)


# -- when all goes well -------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 4, 22, 200])
async def test_the_tokens_are_the_engines(num_tokens: int) -> None:
    prompt = make_prompt(num_tokens)
    async with running_cluster() as cluster:
        items = await generate(cluster, make_request(prompt, max_tokens=20))
        assert tokens(items) == expected_tokens(prompt, 20)
        assert [item.finish for item in items][-1] is FinishReason.LENGTH
        await until_idle(*cluster.workers)


async def test_the_last_item_says_who_served_and_what_was_moved() -> None:
    async with running_cluster() as cluster:
        *others, last = await generate(cluster, make_request(PROMPT))
        assert all(item.timings is None for item in others)
        timings = last.timings
        assert timings is not None
        assert timings.prefill_worker in {"prefill-0", "prefill-1"}
        assert timings.decode_worker in {"decode-0", "decode-1"}
        assert (timings.attempts, timings.transfer_blocks) == (1, 6)
        assert timings.transfer_bytes == 6 * BLOCK_BYTES
        assert timings.ttft_s > 0


async def test_a_second_turn_goes_where_its_prefix_is_cached() -> None:
    async with running_cluster() as cluster:
        first = await generate(cluster, make_request(PROMPT, name="a"))
        await until_idle(*cluster.workers)
        again = await generate(cluster, make_request([*PROMPT, 1, 2, 3], name="b"))
        assert again[-1].cached_tokens == 20
        assert first[-1].timings is not None
        assert again[-1].timings is not None
        assert again[-1].timings.prefill_worker == first[-1].timings.prefill_worker
        assert tokens(again) == expected_tokens([*PROMPT, 1, 2, 3], 16)


async def test_an_answer_of_one_token_needs_no_decode_worker() -> None:
    async with running_cluster(decode=0) as cluster:
        items = await generate(cluster, make_request(PROMPT, max_tokens=1))
        assert tokens(items) == expected_tokens(PROMPT, 1)
        await until_idle(*cluster.workers)


@pytest.mark.parametrize("position", [0, 1, 9])
async def test_a_stop_token_ends_the_answer_wherever_it_comes(position: int) -> None:
    wanted = expected_tokens(PROMPT, position + 1)
    async with running_cluster() as cluster:
        request = make_request(PROMPT, max_tokens=50, stop_token_ids=wanted[-1:])
        items = await generate(cluster, request)
        assert tokens(items) == wanted
        assert items[-1].finish is FinishReason.STOP
        await until_idle(*cluster.workers)


async def test_many_requests_at_once_do_not_touch_each_other() -> None:
    prompts = [make_prompt(3 + 7 * i, seed=i) for i in range(16)]
    settings = make_settings(num_blocks=128, step_tokens=32)
    async with running_cluster(prefill_settings=settings, decode_settings=settings) as cluster:
        answers = await asyncio.gather(
            *(
                generate(cluster, make_request(prompt, name=str(i), max_tokens=24))
                for i, prompt in enumerate(prompts)
            )
        )
        assert [tokens(a) for a in answers] == [expected_tokens(p, 24) for p in prompts]
        await until_idle(*cluster.workers)


def _attempts() -> set[int]:
    return {id(known) for known in gc.get_objects() if type(known) is Attempt}


class Satisfied:
    """A sink that a stop string ends, if it is to, at the first token it is given by itself."""

    def __init__(self, *, early: bool) -> None:
        self.early = early
        self.taken = 0

    def token(self, token: int) -> None:
        self.taken += 1
        if self.early:
            raise Enough("a stop string matched")

    def take(self, item: Generated) -> None:
        self.taken += len(item.tokens)


@pytest.mark.parametrize("early", [False, True], ids=["finished", "stopped"])
async def test_an_attempt_is_gone_when_it_has_ended_without_the_garbage_collector(
    early: bool,
) -> None:
    async with running_cluster() as cluster:
        gc.collect()
        others = _attempts()  # which what other tests left behind still knows
        gc.disable()
        try:
            sink = Satisfied(early=early)
            with suppress(Enough):
                await soon(cluster.flow.run(make_request(PROMPT, max_tokens=8), sink))
            assert (sink.taken < 8) is early
            assert _attempts() <= others
        finally:
            gc.enable()


async def test_limits_are_those_of_the_smallest_worker() -> None:
    small = make_settings(num_blocks=10)
    async with running_cluster(prefill=1, decode=1, decode_settings=small) as cluster:
        limits = cluster.flow.limits()
        assert (limits.context_tokens, limits.ready) == (40, True)


async def test_a_pool_without_workers_is_not_ready() -> None:
    async with running_cluster(decode=0) as cluster:
        assert not cluster.flow.limits().ready


async def test_the_status_table_has_every_worker() -> None:
    async with running_cluster(prefill=1, decode=1) as cluster:
        rows = {view.worker_id: view for view in cluster.flow.workers()}
        assert {name: view.role for name, view in rows.items()} == {
            "prefill-0": Role.PREFILL,
            "decode-0": Role.DECODE,
        }
        assert all(view.connected and view.total_blocks == 256 for view in rows.values())


async def test_the_status_table_says_why_a_worker_is_not_connected() -> None:
    async with running_cluster(prefill=1, decode=1) as cluster:
        other = replace(
            cluster.decode[0].record,
            worker_id=WorkerId("other"),
            incarnation=Incarnation("another life"),
        )
        await cluster.registry.register(other, 3600.0)

        def reasons() -> list[str]:
            return [status.reason for status in cluster.flow.workers() if not status.connected]

        await until(lambda: any(reasons()), "the reason")
        assert reasons() == [f"{other.router_address} is another worker's now"]


async def test_every_placement_is_a_line_that_explains_itself_where_that_is_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running_cluster() as cluster:
        await generate(cluster, make_request(PROMPT, name="quiet"))
        with caplog.at_level(logging.DEBUG, "router.attempt"):
            items = await generate(cluster, make_request(make_prompt(30), name="asked"))
    timings = items[-1].timings
    assert timings is not None
    lines = [m for m in caplog.messages if m.startswith("route_")]
    assert [line.split(" ")[:3] for line in lines] == [
        ["route_prefill", "request_id=asked", timings.prefill_worker],
        ["route_decode", "request_id=asked", timings.decode_worker],
    ]
    for line in lines:  # the candidates, each with its cost and what that is made of
        assert re.search(r" by .+: .*[a-z]+-\d=[-\d.e]+\(\w+=", line), line


# -- workers that die ---------------------------------------------------------------------------


async def test_a_decode_worker_lost_in_mid_stream_costs_only_a_pause() -> None:
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=20))
        for served in cluster.decode:
            served.gate.allow(5)
        await client.said(6)
        (first,) = busy(cluster.decode)
        await first.stop_serving()
        for served in cluster.decode:
            served.gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 20)
        timings = client.items[-1].timings
        assert timings is not None
        assert timings.attempts == 2
        assert timings.decode_worker != first.record.worker_id
        await until_idle(*cluster.workers)


async def test_a_prefill_worker_lost_before_its_first_token_is_replaced() -> None:
    async with running_cluster(gated_prefill=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=20))
        await until(lambda: len(busy(cluster.prefill)) == 1, "a prefill")
        (first,) = busy(cluster.prefill)
        await first.stop_serving()
        for served in cluster.prefill:
            served.gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 20)
        timings = client.items[-1].timings
        assert timings is not None
        assert (timings.attempts, timings.prefill_worker != first.record.worker_id) == (2, True)
        await until_idle(*cluster.workers)


async def test_a_prefill_worker_lost_after_the_hand_off_is_not_missed() -> None:
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=20))
        for served in cluster.decode:
            served.gate.allow(5)
        await client.said(6)
        owner = next(s for s in cluster.prefill if s.worker.leases.counters.opened)
        await owner.stop_serving()
        await until(lambda: len(cluster.fleet.pool(Role.PREFILL).workers) == 1, "the loss noticed")
        for served in cluster.decode:
            served.gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 20)
        timings = client.items[-1].timings
        assert timings is not None
        assert timings.attempts == 1
        await until_idle(*cluster.workers)


async def test_each_worker_lost_by_a_long_answer_costs_only_a_pause() -> None:
    deaths = 4
    async with (
        running_cluster(gated_decode=True, decode=deaths + 1) as cluster,
        asyncio.TaskGroup() as group,
    ):
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=60))
        for _ in range(deaths):
            said = len(tokens(client.items))
            await until(lambda: len(busy(cluster.decode)) == 1, "a decode leg")
            (serving,) = busy(cluster.decode)
            serving.gate.allow(5)
            await client.said(said + 3)
            await serving.stop_serving()
            cluster.decode.remove(serving)
        for served in cluster.decode:
            served.gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 60)
        timings = client.items[-1].timings
        assert timings is not None
        assert timings.attempts == deaths + 1 > RouterConfig().max_attempts


async def test_a_sequence_that_kills_whoever_decodes_it_ends_while_workers_are_left() -> None:
    async with (
        running_cluster(gated_decode=True, decode=5) as cluster,
        asyncio.TaskGroup() as group,
    ):
        client = group.create_task(failing(cluster, make_request(PROMPT, max_tokens=60)))
        left = list(cluster.decode)
        for _ in range(RouterConfig().max_attempts):
            await until(lambda: len(busy(left)) == 1, "a decode leg")
            (serving,) = busy(left)
            await serving.stop_serving()
            left.remove(serving)
        assert isinstance(await soon(client), WorkerLost)
        await until_idle(*(served.worker for served in [*cluster.prefill, *left]))


# -- workers that fail --------------------------------------------------------------------------


def break_engine(patch: pytest.MonkeyPatch, served: ServedWorker) -> None:
    """It goes on, and says of every sequence that it cannot."""

    def step(steps: list[SeqStep]) -> list[InternalError]:
        return [InternalError("no valid logits") for _ in steps]

    patch.setattr(served.engine, "step", step)


async def test_a_decode_worker_that_fails_in_mid_stream_costs_only_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=20))
        for served in cluster.decode:
            served.gate.allow(5)
        await client.said(6)
        (sick,) = busy(cluster.decode)
        break_engine(monkeypatch, sick)
        for served in cluster.decode:
            served.gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 20)
        timings = client.items[-1].timings
        assert timings is not None
        assert timings.attempts == 2
        assert timings.decode_worker != sick.record.worker_id
        await until_idle(*cluster.workers)


async def test_a_prefill_worker_that_fails_costs_no_answer_and_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = RouterConfig(local_prefill=False, eject_after_failures=3, eject_s=60.0)
    clock = ShiftedClock()
    async with running_cluster(router=config, clock=clock) as cluster:
        sick = cluster.prefill[0]
        break_engine(monkeypatch, sick)
        for n in range(20):
            prompt = make_prompt(22, seed=n)
            items = await generate(cluster, make_request(prompt, name=str(n)))
            assert tokens(items) == expected_tokens(prompt, 16)
            clock.ahead_s += 1.0
        shown = {status.worker_id: status.ejected_for for status in cluster.flow.workers()}
        assert shown.pop(sick.record.worker_id) == "failures"
        assert set(shown.values()) == {""}
        await until_idle(*cluster.workers)


async def test_what_two_workers_fail_at_is_answered_500(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster(prefill=3, router=RouterConfig(local_prefill=False)) as cluster:
        for served in cluster.prefill:
            break_engine(monkeypatch, served)
        error = await failing(cluster, make_request(PROMPT))
        assert isinstance(error, WorkerFailed)
        assert error.http_status == 500
        tried = [s for s in cluster.prefill if s.worker.leases.counters.opened]
        assert len(tried) == 2
        await until_idle(*cluster.workers)


async def test_damaged_kv_is_tried_again_elsewhere() -> None:
    async with running_cluster() as cluster:
        for served in cluster.prefill:
            await generate(cluster, make_request(PROMPT, name=served.record.worker_id))
        await until_idle(*cluster.workers)
        holder = next(s for s in cluster.prefill if s.worker.pool.hashes())
        holder.engine.arena.data[:] = 0
        items = await generate(cluster, make_request(PROMPT, name="again"))
        assert tokens(items) == expected_tokens(PROMPT, 16)
        assert items[-1].timings is not None
        assert items[-1].timings.attempts == 2


async def test_kv_proven_wrong_is_not_fetched_from_the_same_prefill_worker_again() -> None:
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=20))
        await client.said(1)
        (owner,) = (s for s in cluster.prefill if s.worker.leases.counters.opened)
        (reader,) = busy(cluster.decode)
        await until(reader.gate.waiting.is_set, "a step in flight")
        reader.gate.allow(1)
        await client.said(2)
        reader.engine.arena.data[:] = 0
        for served in cluster.decode:
            served.gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 20)
        timings = client.items[-1].timings
        assert timings is not None
        assert timings.attempts == 2
        assert timings.prefill_worker != owner.record.worker_id
        assert timings.decode_worker != reader.record.worker_id
        await until_idle(*cluster.workers)


async def test_without_any_decode_worker_left_the_error_comes_soon() -> None:
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        client = group.create_task(
            failing(cluster, make_request(PROMPT, max_tokens=20, deadline_s=20.0))
        )
        await until(lambda: bool(busy(cluster.decode)), "a decode leg")
        started_s = SystemClock().now_s()
        for served in cluster.decode:
            await served.stop_serving()
        error = await soon(client)
        assert isinstance(error, Unavailable)
        assert SystemClock().now_s() - started_s < 5
        await until_idle(*(served.worker for served in cluster.prefill))


async def failing(cluster: Cluster, request: GenerateRequest) -> BaseException:
    with pytest.raises(Exception) as caught:
        await generate(cluster, request)
    return caught.value


async def test_a_request_waits_for_a_worker_that_comes_in_time() -> None:
    patient = RouterConfig(worker_wait_s=20)
    async with running_cluster(prefill=0, router=patient) as cluster, asyncio.TaskGroup() as group:
        client = group.create_task(generate(cluster, make_request(PROMPT, max_tokens=4)))
        await asyncio.sleep(0)
        async with served_worker("prefill-late", Role.PREFILL, cluster.hub) as late:
            await cluster.registry.register(late.record, 3600.0)
            assert tokens(await soon(client)) == expected_tokens(PROMPT, 4)


@pytest.mark.parametrize("admission", ["slo", "off"])
@pytest.mark.parametrize("missing", list(Role))
async def test_a_restart_gathers_a_line_and_no_crowd(
    missing: Role, admission: Literal["slo", "off"]
) -> None:
    config = RouterConfig(worker_wait_s=20, admission_max_requests=2, admission=admission)
    workers = {str(role): int(role is not missing) for role in Role}
    async with running_cluster(router=config, **workers) as cluster:  # type: ignore[arg-type]
        prompts = [make_prompt(22, seed=i) for i in range(5)]
        asked = [
            asyncio.create_task(
                collect_all(cluster, make_request(prompt, name=f"{i}", max_tokens=4))
            )
            for i, prompt in enumerate(prompts)
        ]
        held, refused = asked[:2], asked[2:]
        for task in refused:
            with pytest.raises(Overloaded, match="2 requests wait for a worker"):
                await soon(task)
        async with served_worker("late", missing, cluster.hub) as late:
            await cluster.registry.register(late.record, 3600.0)
            answers = [await soon(task) for task in held]
            assert answers == [expected_tokens(prompt, 4) for prompt in prompts[:2]]
            await until_idle(*cluster.workers, late.worker)


async def test_a_request_that_finds_all_workers_restarting_is_held_and_answered() -> None:
    """It is planned as over HTTP, where the limits say how long its answer may be."""
    config = RouterConfig(worker_wait_s=20)
    async with running_cluster(prefill=1, decode=1, router=config) as cluster:
        before = cluster.flow.limits()
        for served in (*cluster.prefill, *cluster.decode):
            await served.stop_serving()
        await until(lambda: not any(w.connected for w in cluster.flow.workers()), "all lost")
        limits = cluster.flow.limits()
        assert not limits.ready
        assert limits.context_tokens == before.context_tokens > 0
        client = asyncio.create_task(collect_all(cluster, make_request(PROMPT, max_tokens=4)))
        async with (
            served_worker("p", Role.PREFILL, cluster.hub) as prefill,
            served_worker("d", Role.DECODE, cluster.hub) as decode,
        ):
            for late in (prefill, decode):
                await cluster.registry.register(late.record, 3600.0)
            assert await soon(client) == expected_tokens(PROMPT, 4)
            await until_idle(prefill.worker, decode.worker)


async def collect_all(cluster: Cluster, request: GenerateRequest) -> list[int]:
    return tokens(await generate(cluster, request))


async def test_an_answer_that_has_begun_goes_on_when_its_pool_is_there_again() -> None:
    config = RouterConfig(worker_wait_s=20, admission_max_requests=0)
    async with (
        running_cluster(decode=1, gated_decode=True, router=config) as cluster,
        asyncio.TaskGroup() as group,
    ):
        client = Reading(group, cluster, make_request(PROMPT, max_tokens=20))
        cluster.decode[0].gate.allow(5)
        await client.said(6)
        await cluster.decode[0].stop_serving()
        await until(lambda: not cluster.flow.limits().ready, "the loss")
        async with served_worker("late", Role.DECODE, cluster.hub) as late:
            await cluster.registry.register(late.record, 3600.0)
            assert await client.ended() == expected_tokens(PROMPT, 20)
            await until_idle(late.worker, *(served.worker for served in cluster.prefill))


async def test_without_prefill_workers_nothing_is_tried() -> None:
    async with running_cluster(prefill=0) as cluster:
        assert isinstance(await failing(cluster, make_request(PROMPT)), NoWorkers)


async def test_a_draining_worker_finishes_what_it_has_and_gets_nothing_new() -> None:
    async with running_cluster(gated_decode=True) as cluster, asyncio.TaskGroup() as group:
        client = Reading(group, cluster, make_request(PROMPT, name="a", max_tokens=20))
        await client.said(1)
        await until(lambda: bool(busy(cluster.decode)), "a decode leg")
        (old,) = busy(cluster.decode)
        draining = group.create_task(old.worker.drain(10.0))
        await until(lambda: len(cluster.fleet.pool(Role.DECODE).workers) == 1, "the drain seen")
        for served in cluster.decode:
            served.gate.open()
        later = await generate(cluster, make_request(make_prompt(9), name="b"))
        assert await client.ended() == expected_tokens(PROMPT, 20)
        assert await soon(draining) == 0
        timings = client.items[-1].timings
        assert timings is not None
        assert (timings.attempts, timings.decode_worker) == (1, old.record.worker_id)
        assert later[-1].timings is not None
        assert later[-1].timings.decode_worker != old.record.worker_id


# -- workers that say no ------------------------------------------------------------------------


class InOrder(Stateless):
    """A policy that takes the first worker by name, however full it is."""

    def __init__(self) -> None:
        self.chosen: list[str] = []

    def choose(self, query: DecodeQuery) -> Decision:
        first = min(worker for worker in query.pool if query.is_open(worker))
        self.chosen.append(first)
        return Decision(first, ())


async def test_a_decode_workers_no_costs_another_choice_and_not_an_attempt() -> None:
    policy = InOrder()
    async with (
        running_cluster(
            gated_decode=True,
            decode_settings=make_settings(max_sequences=1),
            decode_policy=policy,
        ) as cluster,
        asyncio.TaskGroup() as group,
    ):
        first = Reading(group, cluster, make_request(PROMPT, name="a", max_tokens=20))
        await until(lambda: len(busy(cluster.decode)) == 1, "the first one placed")
        prompt = make_prompt(30, seed=1)
        second = Reading(group, cluster, make_request(prompt, name="b", max_tokens=20))
        await until(lambda: len(busy(cluster.decode)) == 2, "the second one placed")
        for served in cluster.decode:
            served.gate.open()
        assert await first.ended() == expected_tokens(PROMPT, 20)
        assert await second.ended() == expected_tokens(prompt, 20)
        assert policy.chosen == ["decode-0", "decode-0", "decode-1"]
        timings = second.items[-1].timings
        assert timings is not None
        assert (timings.attempts, timings.decode_worker) == (1, "decode-1")
        leases = [served.worker.leases.counters for served in cluster.prefill]
        assert sum(c.opened for c in leases) == sum(c.ended[LeaseEnd.CLOSED] for c in leases) == 2
        await until_idle(*cluster.workers)


async def test_a_prompt_no_worker_can_hold_is_the_callers_to_mend() -> None:
    async with running_cluster(prefill_settings=make_settings(num_blocks=4)) as cluster:
        error = await failing(cluster, make_request(PROMPT))
        assert isinstance(error, InvalidRequest)
        await until_idle(*cluster.workers)


async def test_a_full_prefill_pool_is_an_overload_after_all_attempts() -> None:
    full = make_settings(max_queued_tokens=1)
    async with (
        running_cluster(
            prefill=1,
            gated_prefill=True,
            prefill_settings=full,
            router=RouterConfig(max_attempts=2),
        ) as cluster,
        asyncio.TaskGroup() as group,
    ):
        client = Reading(group, cluster, make_request(PROMPT, name="a"))
        await until(lambda: bool(busy(cluster.prefill)), "a prefill")
        error = await failing(cluster, make_request(PROMPT, name="b"))
        assert getattr(error, "code", None) == "overloaded"
        cluster.prefill[0].gate.open()
        assert await client.ended() == expected_tokens(PROMPT, 16)


async def test_a_prompt_refused_by_full_workers_is_offered_to_the_others_within_one_attempt() -> (
    None
):
    config = RouterConfig(max_attempts=1, prefill_policy="round_robin", admission="off")
    async with (
        running_cluster(
            prefill=3,
            gated_prefill=True,
            prefill_settings=make_settings(max_queued_tokens=1),
            router=config,
        ) as cluster,
        asyncio.TaskGroup() as group,
    ):
        readers = []
        for i in range(3):
            prompt = make_prompt(22, seed=i)
            readers.append(Reading(group, cluster, make_request(prompt, name=f"r{i}")))
            await until(lambda n=i: len(busy(cluster.prefill)) > n, "a prefill")
        error = await failing(cluster, make_request(make_prompt(22, seed=8), name="all-full"))
        assert isinstance(error, Overloaded)
        last = cluster.prefill[2]
        last.gate.open()
        await until(lambda: last.worker.runner.load().queued_tokens == 0, "room at the last one")
        prompt = make_prompt(22, seed=9)
        again = Reading(group, cluster, make_request(prompt, name="again"))
        assert await again.ended() == expected_tokens(prompt, 16)
        timings = again.items[-1].timings
        assert timings is not None
        assert timings.prefill_worker == last.worker.hello().worker_id
        for served in cluster.prefill:
            served.gate.open()
        for i, reader in enumerate(readers):
            assert await reader.ended() == expected_tokens(make_prompt(22, seed=i), 16)
        await until_idle(*cluster.workers)


@pytest.mark.parametrize("max_attempts", [1, 2])
async def test_a_row_of_noes_is_bounded_and_the_next_one_asks_the_others(
    max_attempts: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = RouterConfig(
        max_attempts=max_attempts, max_forwards=2, prefill_policy="round_robin", admission="off"
    )
    async with (
        running_cluster(
            prefill=3,
            gated_prefill=True,
            prefill_settings=make_settings(max_queued_tokens=1),
            router=config,
        ) as cluster,
        asyncio.TaskGroup() as group,
    ):
        for i in range(3):
            prompt = make_prompt(22, seed=i)
            Reading(group, cluster, make_request(prompt, name=f"r{i}"))
            await until(lambda n=i: len(busy(cluster.prefill)) > n, "a prefill")
        last = cluster.prefill[2]
        last.gate.open()
        await until(lambda: last.worker.runner.load().queued_tokens == 0, "room at the last one")
        request = make_request(make_prompt(22, seed=9), name="late")
        with caplog.at_level(logging.DEBUG, "router.flow"):
            if max_attempts == 1:
                assert isinstance(await failing(cluster, request), Overloaded)
            else:
                items = await generate(cluster, request)
                assert tokens(items) == expected_tokens(request.prompt_tokens, 16)
                assert items[-1].timings is not None
                assert items[-1].timings.attempts == 3
        (line,) = (m for m in caplog.messages if m.startswith("prompt_forwarded"))
        assert "request_id=late worker_id=prefill-0" in line
        assert line.endswith('load="22 prompt tokens are queued already" next=prefill-1')
        for served in cluster.prefill:
            served.gate.open()


async def test_an_answer_that_has_begun_waits_for_full_workers_instead_of_being_refused() -> None:
    one = make_settings(max_sequences=1)
    async with (
        running_cluster(
            gated_decode=True, decode_settings=one, router=RouterConfig(max_attempts=2)
        ) as cluster,
        asyncio.TaskGroup() as group,
    ):
        first = Reading(group, cluster, make_request(PROMPT, name="a", max_tokens=20))
        await until(lambda: len(busy(cluster.decode)) == 1, "the first one placed")
        (lost,) = busy(cluster.decode)
        prompt = make_prompt(30, seed=1)
        second = Reading(group, cluster, make_request(prompt, name="b", max_tokens=20))
        await until(lambda: len(busy(cluster.decode)) == 2, "the second one placed")
        lost.gate.allow(5)
        await first.said(3)
        await lost.stop_serving()
        leases = [served.worker.leases.counters for served in cluster.prefill]
        await until(lambda: sum(c.opened for c in leases) >= 7, "more tries than max_attempts")
        for served in cluster.decode:
            served.gate.open()
        assert await second.ended() == expected_tokens(prompt, 20)
        assert await first.ended() == expected_tokens(PROMPT, 20)


# -- prompts a decode worker has most of --------------------------------------------------------


async def test_the_next_turn_is_computed_where_the_last_answer_was_given() -> None:
    clock, prompt = ShiftedClock(), make_prompt(80)
    async with running_cluster(clock=clock) as cluster:
        for i in range(4):
            await generate(cluster, make_request(make_prompt(30, seed=i), name=f"w{i}"))
            clock.ahead_s += 1.0
        first = await generate(cluster, make_request(prompt, name="first"))
        await until_idle(*cluster.workers)
        turn = [*prompt, *tokens(first), 1, 2, 3]
        again = await generate(cluster, make_request(turn, name="again", max_tokens=20))
        assert tokens(again) == expected_tokens(turn, 20)
        assert first[-1].timings is not None
        timings = again[-1].timings
        assert timings is not None
        assert timings.decode_worker == timings.prefill_worker == first[-1].timings.decode_worker
        assert (timings.transfer_blocks, timings.attempts) == (0, 1)
        assert again[-1].cached_tokens == 92
        await until_idle(*cluster.workers)


# -- overload and workers that misbehave --------------------------------------------------------


class ShiftedClock(SystemClock):
    """Runs as time does, and is put forward by a test."""

    ahead_s = 0.0

    def now_s(self) -> float:
        return super().now_s() + self.ahead_s


async def test_under_load_a_request_is_refused_early_and_served_when_the_load_is_gone() -> None:
    """A prefill takes half a second of a clock that only the test moves far, so what this machine
    itself takes moves no verdict.
    """
    clock, slo = ShiftedClock(), Slo(ttft_s=0.6, tpot_s=1.0)
    config = RouterConfig(local_prefill=False)  # the idle decode worker would take it
    async with (
        running_cluster(
            prefill=1, gated_prefill=True, clock=clock, slo=slo, router=config
        ) as cluster,
        asyncio.TaskGroup() as group,
    ):
        gate = cluster.prefill[0].gate
        for i in range(4):  # as many as a curve wants to have seen
            warm = Reading(group, cluster, make_request(make_prompt(30, seed=i), name=f"w{i}"))
            await until(gate.waiting.is_set, "a prefill that has begun")
            clock.ahead_s += 0.5
            gate.allow(1)
            await warm.ended()
        load = Reading(group, cluster, make_request(make_prompt(800), name="load"))
        await until(lambda: bool(busy(cluster.prefill)), "a prefill")
        error = await failing(cluster, make_request(PROMPT, name="b"))
        assert isinstance(error, Overloaded)
        assert error.retry_after_s >= 1
        gate.open()
        await load.ended()
        await until_idle(*cluster.workers)
        items = await generate(cluster, make_request(PROMPT, name="c"))
        assert tokens(items) == expected_tokens(PROMPT, 16)


async def test_a_worker_that_fails_is_shown_as_ejected_and_left_out_until_it_answers_again() -> (
    None
):
    strict = RouterConfig(worker_wait_s=0, eject_after_failures=1, eject_s=5.0, local_prefill=False)
    clock = ShiftedClock()
    async with running_cluster(router=strict, clock=clock) as cluster:

        def ejected() -> set[str]:
            return {status.worker_id for status in cluster.flow.workers() if status.ejected}

        async def prefilled_by(seed: int) -> str:
            request = make_request(make_prompt(22, seed=seed), name=f"later{seed}")
            timings = (await generate(cluster, request))[-1].timings
            assert timings is not None
            return timings.prefill_worker

        for served in cluster.prefill:
            await generate(cluster, make_request(PROMPT, name=served.record.worker_id))
        await until_idle(*cluster.workers)
        holder = next(s for s in cluster.prefill if s.worker.pool.hashes())
        holder.engine.arena.data[:] = 0
        await generate(cluster, make_request(PROMPT, name="again"))
        assert ejected() == {holder.record.worker_id}
        for seed in range(10, 20):
            assert await prefilled_by(seed) != holder.record.worker_id
        clock.ahead_s += 5.0
        later = [await prefilled_by(seed) for seed in range(20, 50)]
        assert holder.record.worker_id in later
        assert ejected() == set()
        await until_idle(*cluster.workers)


# -- clients that leave, and time that runs out -------------------------------------------------


@pytest.mark.parametrize("gated", ["prefill", "decode"])
async def test_the_deadline_ends_the_request_and_both_legs(gated: str) -> None:
    async with running_cluster(
        gated_prefill=gated == "prefill", gated_decode=gated == "decode"
    ) as cluster:
        error = await failing(cluster, make_request(PROMPT, max_tokens=20, deadline_s=0.3))
        assert isinstance(error, DeadlineExceeded)
        for served in [*cluster.prefill, *cluster.decode]:
            served.gate.open()
        await until_idle(*cluster.workers)


async def test_closing_the_generator_early_cancels_both_legs() -> None:
    async with running_cluster(gated_decode=True) as cluster:
        async with aclosing(cluster.flow.generate(make_request(PROMPT))) as generated:
            await soon(anext(generated))
            await until(lambda: bool(busy(cluster.decode)), "a decode leg")
        await until(lambda: not busy([*cluster.prefill, *cluster.decode]), "no leg open")
        for served in cluster.decode:
            served.gate.open()
        await until_idle(*cluster.workers)


@pytest.mark.parametrize("gated", ["prefill", "decode"])
async def test_a_cancelled_reader_cancels_both_legs(gated: str) -> None:
    async with (
        running_cluster(
            gated_prefill=gated == "prefill", gated_decode=gated == "decode"
        ) as cluster,
        asyncio.TaskGroup() as group,
    ):
        client = Reading(group, cluster, make_request(PROMPT))
        await until(lambda: bool(busy(cluster.prefill) and busy(cluster.decode)), "both legs")
        client.task.cancel()
        await until(lambda: not busy([*cluster.prefill, *cluster.decode]), "no leg open")
        for served in [*cluster.prefill, *cluster.decode]:
            served.gate.open()
        await until_idle(*cluster.workers)
