"""One worker as its routers see it: roles, drains, reports, cache events; then two of them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest

from cluster.worker.outlet import RouterOutlet
from core.blocks import chain_hashes, root_hash
from core.ids import Incarnation, LeaseId, RequestId, Role, SequenceId, WorkerId
from core.messages import (
    HEARTBEAT_S,
    PROTOCOL_MAJOR,
    Cancel,
    Handoff,
    KvEvents,
    KvSnapshot,
    KvStored,
    LoadReport,
    Rejected,
    SnapshotRequest,
    WorkerHello,
    WorkerToRouter,
)
from core.stream import MessageStream, dial
from engine.scheduler import RunnerLoad
from kv_transfer.loopback import LoopbackHub
from kv_transfer.metrics import LeaseEnd
from router.codec import from_worker, to_worker
from tests.builders import (
    BLOCK_SIZE,
    NEWER_MESSAGE,
    RouterEnd,
    ServedWorker,
    decode_submit,
    expected_tokens,
    make_prompt,
    make_settings,
    prefill_submit,
    served_worker,
    soon,
    until,
    until_idle,
    worker_pair,
)
from tests.router.views import IDLE
from wire import common_pb2, worker_pb2, worker_pb2_grpc

PROMPT = make_prompt(22)


@asynccontextmanager
async def prefill_worker(*, gated: bool = False) -> AsyncIterator[ServedWorker]:
    async with served_worker("p", Role.PREFILL, LoopbackHub(), gated=gated) as served:
        yield served


async def run_prompt(end: RouterEnd, number: int, prompt: tuple[int, ...]) -> None:
    submit = prefill_submit(number, prompt, name=str(number), max_tokens=1)
    end.worker.handle(end.outlet, submit)
    await end.answered(number)


# -- what a router hears ------------------------------------------------------------------------


async def test_a_router_hears_who_it_is_what_it_holds_and_its_load_first() -> None:
    async with prefill_worker() as served:
        end = RouterEnd(served.worker)
        await end.first(LoadReport)
        assert [type(m) for m in end.messages] == [WorkerHello, KvSnapshot, LoadReport]
        hello = end.of(WorkerHello)[0]
        assert (hello.worker_id, hello.role, hello.epoch) == ("p", Role.PREFILL, 1)
        assert hello.peer_address == served.peer_address


async def test_a_router_hears_what_a_step_takes() -> None:
    settings = make_settings(step_tokens=32)
    engine = settings.engine.model_copy(update={"chunk_tokens": 8})
    hub = LoopbackHub()
    async with served_worker(
        "p", Role.PREFILL, hub, worker_settings=replace(settings, engine=engine)
    ) as served:
        end = RouterEnd(served.worker)
        await end.first(WorkerHello)
        hello = end.of(WorkerHello)[0]
        assert (hello.step_tokens, hello.chunk_tokens) == (32, 8)


async def test_a_load_report_names_the_last_submit_it_holds() -> None:
    async with prefill_worker(gated=True) as served:
        end = RouterEnd(served.worker)
        for number in (5, 6):
            served.worker.handle(end.outlet, prefill_submit(number, PROMPT, name=str(number)))
        served.gate.allow(1)
        await end.until(lambda: any(m.last_submit == 6 for m in end.of(LoadReport)))
        report = next(m for m in end.of(LoadReport) if m.last_submit == 6)
        assert report.waiting + report.running <= 2


async def test_a_worker_reports_at_its_heartbeat_while_a_step_hangs() -> None:
    async with prefill_worker(gated=True) as served:
        end = RouterEnd(served.worker)
        served.worker.handle(end.outlet, prefill_submit(1, PROMPT))
        await end.until(lambda: len(reported_ages(end)) >= 3)
        assert reported_ages(end) == sorted(reported_ages(end))
        served.gate.open()
        await end.until(lambda: end.of(LoadReport)[-1].step_age_s == 0)


def reported_ages(end: RouterEnd) -> list[float]:
    return [m.step_age_s for m in end.of(LoadReport) if m.step_age_s]


def test_the_age_of_a_step_alone_is_no_news_before_the_heartbeat() -> None:
    said: list[WorkerToRouter] = []
    outlet = RouterOutlet(said.append)
    now_s = 1000.0
    outlet.report(replace(IDLE, step_age_s=1.0), now_s)
    outlet.report(replace(IDLE, step_age_s=1.9), now_s + 0.9 * HEARTBEAT_S)
    beat = replace(IDLE, step_age_s=2.0)
    outlet.report(beat, now_s + HEARTBEAT_S)
    assert len(said) == 2 and said[1] is beat
    outlet.report(replace(IDLE, running=1), now_s + HEARTBEAT_S)
    assert len(said) == 3


async def test_each_router_hears_of_its_own_submits_only() -> None:
    async with prefill_worker() as served:
        mine, other = RouterEnd(served.worker), RouterEnd(served.worker)
        await run_prompt(mine, 7, PROMPT)
        await other.until(lambda: any(m.free_blocks for m in other.of(LoadReport)))
        await other.all_said()
        assert {m.last_submit for m in other.of(LoadReport)} == {0}
        assert other.entries(7) == []


async def test_the_load_is_counted_once_however_many_routers_hear_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with prefill_worker(gated=True) as served:
        worker, looks = served.worker, list[RunnerLoad]()
        load, _ends = worker.runner.load, [RouterEnd(worker) for _ in range(3)]

        def counted() -> RunnerLoad:
            looks.append(load())
            return looks[-1]

        monkeypatch.setattr(worker.runner, "load", counted)
        worker._step_ended()
        assert len(looks) == 1


async def test_new_blocks_are_told_to_every_router_in_numbered_events() -> None:
    async with prefill_worker() as served:
        ends = [RouterEnd(served.worker) for _ in range(2)]
        await run_prompt(ends[0], 1, PROMPT)
        await run_prompt(ends[0], 2, make_prompt(9, seed=1))
        wanted = 2
        for end in ends:
            await end.until(lambda e=end: len(e.of(KvEvents)) >= wanted)  # type: ignore[misc]
            numbers = [m.first_number for m in end.of(KvEvents)]
            assert numbers == [1, 2]
        root = root_hash(served.engine.info.model_id)
        (stored,) = ends[1].of(KvEvents)[0].events
        assert stored == KvStored(parent=root, hashes=tuple(chain_hashes(PROMPT, BLOCK_SIZE, root)))


async def test_a_snapshot_holds_what_the_events_so_far_told() -> None:
    async with prefill_worker() as served:
        end = RouterEnd(served.worker)
        await run_prompt(end, 1, PROMPT)
        served.worker.handle(end.outlet, SnapshotRequest())
        await end.until(lambda: len(end.of(KvSnapshot)) == 2)
        snapshot = end.of(KvSnapshot)[1]
        told = [h for m in end.of(KvEvents) for e in m.events for h in e.hashes]
        assert list(snapshot.hashes) == told
        assert (snapshot.next_number, snapshot.last) == (2, True)


async def test_a_late_router_gets_the_cache_as_a_snapshot() -> None:
    async with prefill_worker() as served:
        await run_prompt(RouterEnd(served.worker), 1, PROMPT)
        late = RouterEnd(served.worker)
        snapshot = await late.first(KvSnapshot)
        assert len(snapshot.hashes) == 5


# -- roles and drains ---------------------------------------------------------------------------


async def test_a_leg_of_the_other_role_is_rejected() -> None:
    async with prefill_worker() as served:
        end = RouterEnd(served.worker)
        handoff = Handoff(
            owner_id=WorkerId("other"),
            owner_address="other",
            owner_incarnation=Incarnation("other"),
            lease_id=LeaseId(1),
        )
        served.worker.handle(end.outlet, decode_submit(1, PROMPT, handoff))
        rejected = await end.first(Rejected)
        assert (rejected.number, rejected.code) == (1, "unavailable")
        assert "role is prefill" in rejected.message


async def test_a_sequence_that_needs_no_hand_off_is_served_by_a_prefill_worker_alone() -> None:
    async with prefill_worker() as served:
        end = RouterEnd(served.worker)
        served.worker.handle(end.outlet, decode_submit(1, PROMPT, None))
        assert await end.answered(1) == expected_tokens(PROMPT, 8)
        decoding = [m for m in end.of(LoadReport) if m.decoding]
        assert decoding
        assert all(m.decoding == 1 and m.decoding_tokens > len(PROMPT) for m in decoding)


async def test_a_decode_worker_computes_no_prompt_for_another() -> None:
    async with served_worker("d", Role.DECODE, LoopbackHub()) as served:
        end = RouterEnd(served.worker)
        served.worker.handle(end.outlet, prefill_submit(1, PROMPT))
        assert "role is decode" in (await end.first(Rejected)).message


async def test_a_draining_worker_rejects_and_says_so_in_its_load() -> None:
    async with prefill_worker() as served:
        end = RouterEnd(served.worker)
        assert await soon(served.worker.drain(1.0)) == 0
        served.worker.handle(end.outlet, prefill_submit(1, PROMPT))
        assert "draining" in (await end.first(Rejected)).message
        assert end.of(LoadReport)[-1].draining


async def test_a_drain_waits_for_the_open_legs() -> None:
    async with prefill_worker(gated=True) as served, asyncio.TaskGroup() as group:
        end = RouterEnd(served.worker)
        served.worker.handle(end.outlet, prefill_submit(1, PROMPT, max_tokens=1))
        draining = group.create_task(served.worker.drain(10.0))
        await until(served.gate.waiting.is_set, "a step in flight")
        assert not draining.done()
        served.gate.open()
        assert await soon(draining) == 0
        assert await end.answered(1) == expected_tokens(PROMPT, 1)


async def test_a_drain_gives_up_after_its_time_and_says_what_is_left() -> None:
    async with prefill_worker(gated=True) as served:
        end = RouterEnd(served.worker)
        served.worker.handle(end.outlet, prefill_submit(1, PROMPT))
        assert await soon(served.worker.drain(0.01)) == 1


# -- its doors ----------------------------------------------------------------------------------


Stream = MessageStream[worker_pb2.ToRouter]


@asynccontextmanager
async def router_stream(served: ServedWorker, **protocol: int) -> AsyncIterator[Stream]:
    """A stream on which a router has said hello."""
    async with dial(served.record.router_address, worker_pb2.ToRouter.FromString) as stream:
        hello = worker_pb2.RouterHello(
            router_id="t", protocol=common_pb2.Protocol(**{"major": PROTOCOL_MAJOR, **protocol})
        )
        stream.send(worker_pb2.ToWorker(hello=hello))
        yield stream


async def read_until(stream: Stream, kind: str) -> worker_pb2.ToRouter:
    async with asyncio.timeout(10):
        while True:
            message = await stream.read()
            assert message is not None
            if message.WhichOneof("message") == kind:
                return message


async def refusal(stream: Stream) -> str:
    """Why, when that is all that is said."""
    (message, end) = await soon(stream.read()), await soon(stream.read())
    assert message is not None and end is None
    return message.refused.reason


async def test_another_major_version_is_refused() -> None:
    async with (
        prefill_worker() as served,
        router_stream(served, major=PROTOCOL_MAJOR + 1) as stream,
    ):
        assert f"router protocol {PROTOCOL_MAJOR + 1}" in await refusal(stream)


async def test_a_newer_minor_version_and_its_messages_are_served() -> None:
    async with prefill_worker() as served, router_stream(served, minor=99) as stream:
        stream.send(worker_pb2.ToWorker.FromString(NEWER_MESSAGE))
        stream.send(to_worker(prefill_submit(1, PROMPT, max_tokens=1)))
        frame = await read_until(stream, "tokens")
        assert list(frame.tokens.entries[0].tokens) == expected_tokens(PROMPT, 1)


async def test_a_stream_without_a_hello_is_refused() -> None:
    async with (
        prefill_worker() as served,
        dial(served.record.router_address, worker_pb2.ToRouter.FromString) as stream,
    ):
        stream.send(to_worker(Cancel(number=1, reason="")))
        assert "a hello must come first" in await refusal(stream)


async def test_what_is_no_router_stream_ends_only_itself_and_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with prefill_worker() as served, router_stream(served) as stream:
        host, _, port = served.record.router_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        stranger, its_port = writer.get_extra_info("sockname")
        writer.write(b"\x00\x00\x00\x02\xff\xff")
        assert await soon(reader.read()) == b""
        writer.close()
        await read_until(stream, "load")
    assert f"router_stream_ended from={stranger}:{its_port} reason=" in caplog.text


async def test_a_broken_stream_ends_its_legs_at_once() -> None:
    async with prefill_worker(gated=True) as served:
        async with router_stream(served) as stream:
            stream.send(to_worker(prefill_submit(1, PROMPT)))
            await read_until(stream, "accepted")
            assert served.worker.open_legs == 1
        served.gate.open()
        await until_idle(served.worker)


async def test_statistics_show_blocks_and_leases() -> None:
    async with prefill_worker() as served, router_stream(served) as stream:
        stream.send(to_worker(prefill_submit(1, PROMPT)))
        accepted = from_worker(await read_until(stream, "accepted"))
        await read_until(stream, "tokens")
        async with grpc.aio.insecure_channel(served.record.address) as channel:
            stats = await worker_pb2_grpc.WorkerStub(channel).Stats(worker_pb2.StatsRequest())
        (lease,) = stats.leases
        assert lease.lease_id == accepted.lease_id  # type: ignore[union-attr]
        assert (lease.blocks, lease.reader, lease.sequence_id.request_id) == (6, "", "r")
        assert 0 < lease.expires_in_s <= 10
        assert (stats.blocks_held, stats.blocks_in_use, stats.pool_error) == (6, 6, "")
        assert (stats.leases_opened, stats.open_legs, list(stats.transports)) == (
            1,
            1,
            ["loopback"],
        )


# -- both roles ---------------------------------------------------------------------------------


async def test_a_hand_off_between_two_workers_end_to_end() -> None:
    async with worker_pair(worker_settings=make_settings(step_tokens=8)) as pair:
        handoff = await pair.start_prefill(1, PROMPT, max_tokens=20)
        await pair.start_decode(1, PROMPT, handoff, max_tokens=20)
        rest = await pair.to_decode.answered(1)
        await pair.to_prefill.until(lambda: bool(pair.to_prefill.tokens(1)))
        assert pair.to_prefill.tokens(1) + rest == expected_tokens(PROMPT, 20)
        await pair.idle()
        ended = pair.prefill.worker.leases.counters.by_reader
        assert ended == {pair.decode.record.worker_id: {LeaseEnd.CLOSED: 1}}


async def test_the_decode_worker_answers_the_first_token_to_nobody() -> None:
    """It came from the prefill worker already."""
    async with worker_pair() as pair:
        handoff = await pair.start_prefill(1, PROMPT, max_tokens=2)
        await pair.start_decode(1, PROMPT, handoff, max_tokens=2)
        assert await pair.to_decode.answered(1) == expected_tokens(PROMPT, 2)[1:]


async def test_a_lost_prefill_worker_fails_the_decode_leg() -> None:
    async with worker_pair(
        worker_settings=make_settings(step_tokens=8), gated_prefill=True
    ) as pair:
        handoff = await pair.start_prefill(1, PROMPT)
        await pair.start_decode(1, PROMPT, handoff)
        pair.prefill.gate.allow(1)
        await until(lambda: pair.decode.worker.pool.counts().receiving > 0, "a read")
        await pair.prefill.stop_serving()
        await until_idle(pair.decode.worker)
        await pair.to_decode.all_said()
        assert pair.to_decode.failure(1) == "kv_transfer_failed"


async def test_a_worker_that_only_lends_its_cache_is_idle_and_sound() -> None:
    async with prefill_worker() as served:
        worker = served.worker
        await run_prompt(RouterEnd(worker), 1, PROMPT)
        await until_idle(worker)
        prefix = chain_hashes(PROMPT, BLOCK_SIZE, root_hash(worker.peer_hello().model_id))
        fetch = SequenceId(RequestId("fetch"))
        lease = worker.leases.open_cached(fetch, prefix, "another worker")
        counts, problem = worker.pool_counts()
        assert (counts.held, problem) == (len(PROMPT) // BLOCK_SIZE, "")
        worker.leases.abort(lease.lease_id)
