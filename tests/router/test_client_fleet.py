"""Links to real workers in this process: legs, losses, reconnects, and what a newer worker says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest

from core.clock import SystemClock
from core.errors import RequestTooLarge, WorkerLost
from core.ids import BlockHash, Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import (
    PROTOCOL_MAJOR,
    Accepted,
    KvEvents,
    KvSnapshot,
    KvStored,
    LegFailed,
    LegTokens,
    LoadReport,
    PrefillSubmit,
    RouterRefused,
    WorkerHello,
    WorkerToRouter,
)
from core.registry import MemoryRegistry, WorkerRecord
from core.stream import MessageStream, StreamBroken, accepting, address_of, listen
from kv_transfer.loopback import LoopbackHub
from router.client import Leg, LegEvent, WorkerLink
from router.codec import to_router
from router.fleet import Fleet
from router.index import PrefixIndex
from tests.builders import (
    NEWER_MESSAGE,
    WAIT_S,
    ServedWorker,
    expected_tokens,
    make_prompt,
    prefill_submit,
    served_worker,
    soon,
    until,
    until_idle,
)
from wire import worker_pb2

PROMPT = make_prompt(22)
MODEL = ModelId("m")
HASH = BlockHash(bytes(16))


class Events:
    """A leg's listener that keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[LegEvent] = []

    def __call__(self, leg: Leg, event: LegEvent) -> None:
        self.heard.append(event)

    def kinds(self) -> list[type]:
        return [type(event) for event in self.heard]


def one_prefill(max_tokens: int = 1) -> Callable[[int], PrefillSubmit]:
    return lambda number: prefill_submit(number, PROMPT, max_tokens=max_tokens)


def make_link(record: WorkerRecord, model: ModelId, silence_s: float = WAIT_S) -> WorkerLink:
    return WorkerLink(record, "router", model, silence_s, index=PrefixIndex())


@asynccontextmanager
async def linked(record: WorkerRecord, model: ModelId) -> AsyncIterator[WorkerLink]:
    link = WorkerLink(record, "router", model, 5.0, index=PrefixIndex())
    task = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        task.cancel()
        await asyncio.wait([task])


@asynccontextmanager
async def linked_worker(*, gated: bool = False) -> AsyncIterator[tuple[WorkerLink, ServedWorker]]:
    async with (
        served_worker("p", Role.PREFILL, LoopbackHub(), gated=gated) as served,
        linked(served.record, served.engine.info.model_id) as link,
    ):
        await until(lambda: link.routable is not None, "the link routable")
        yield link, served


# -- legs ---------------------------------------------------------------------------------------


async def test_a_leg_hears_its_acceptance_and_its_tokens() -> None:
    async with linked_worker() as (link, _):
        events = Events()
        leg = link.submit(one_prefill(), events, 22, 22)
        await until(lambda: len(events.heard) == 2)
        assert events.kinds() == [Accepted, LegTokens]
        assert list(events.heard[1].tokens) == expected_tokens(PROMPT, 1)  # type: ignore[union-attr]
        assert leg.number == 1


async def test_a_submit_counts_as_load_until_the_worker_reports_it() -> None:
    async with linked_worker() as (link, _):
        assert link.view is not None
        link.submit(one_prefill(), Events(), 22, 22)
        assert link.view.unseen_tokens == 22
        await until(lambda: link.view is not None and link.view.unseen_tokens == 0)


async def test_a_cancelled_leg_is_freed_at_the_worker_and_says_no_more() -> None:
    async with linked_worker(gated=True) as (link, served):
        events = Events()
        leg = link.submit(one_prefill(8), events, 22, 22)
        await until(lambda: bool(events.heard))
        leg.cancel("enough")
        leg.cancel("enough")
        await until(lambda: served.worker.open_legs == 0)
        served.gate.open()
        await until_idle(served.worker)
        assert events.kinds() == [Accepted]


async def test_a_submit_that_is_too_large_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with linked_worker(gated=True) as (link, served):
        events = Events()
        link.submit(one_prefill(), events, 22, 22)
        monkeypatch.setattr("core.stream._MAX_MESSAGE_BYTES", 100)
        with pytest.raises(RequestTooLarge):
            link.submit(lambda n: prefill_submit(n, make_prompt(200)), Events(), 200, 200)
        assert link.view is not None
        assert link.view.unseen_tokens <= 22
        monkeypatch.undo()
        served.gate.open()
        await until(lambda: events.kinds() == [Accepted, LegTokens])


async def test_a_lost_worker_fails_every_open_leg_once() -> None:
    async with linked_worker(gated=True) as (link, served):
        first, second, over = Events(), Events(), Events()
        link.submit(one_prefill(8), first, 22, 22)
        link.submit(one_prefill(8), second, 22, 22)
        link.finish(link.submit(one_prefill(8), over, 22, 22))
        await until(lambda: bool(first.heard and second.heard))
        await served.stop_serving()
        await until(lambda: link.view is None, "the loss noticed")
        for events in (first, second):
            assert events.kinds() == [Accepted, LegFailed]
            assert events.heard[1].code == "worker_lost"  # type: ignore[union-attr]
        assert LegFailed not in over.kinds()


async def test_a_lost_worker_takes_no_more_legs() -> None:
    async with linked_worker() as (link, served):
        await served.stop_serving()
        await until(lambda: link.view is None, "the loss noticed")
        assert link.routable is None
        with pytest.raises(WorkerLost, match="not connected"):
            link.submit(one_prefill(), Events(), 22, 22)


async def test_a_draining_worker_is_not_routable() -> None:
    async with linked_worker() as (link, served):
        await soon(served.worker.drain(1.0))
        await until(lambda: link.routable is None, "the drain seen")
        assert link.view is not None


async def test_a_cache_that_fills_is_seen() -> None:
    async with linked_worker() as (link, served):
        link.submit(one_prefill(), Events(), 22, 22)
        await until(lambda: len(served.worker.pool.hashes()) == 5)
        hashes = served.worker.pool.hashes()
        await until(lambda: link.view is not None and link.view.holdings.depth(hashes) == 5)


# -- a worker that says what it is told ----------------------------------------------------------


HELLO = WorkerHello(
    worker_id=WorkerId("w"),
    incarnation=Incarnation("i"),
    role=Role.PREFILL,
    epoch=1,
    model_id=MODEL,
    layout=KvLayout(block_size=4, num_kv_heads=1, num_layers=1, head_dim=4, dtype="uint8"),
    num_blocks=100,
    context_tokens=1000,
    peer_address="",
)
LOAD = LoadReport(
    last_submit=0,
    queued_tokens=0,
    waiting=0,
    running=0,
    context_tokens=0,
    free_blocks=100,
    total_blocks=100,
)


@dataclass
class ScriptedWorker:
    """Says its script on every stream, then listens until the router leaves."""

    script: list[worker_pb2.ToRouter]
    heard: list[worker_pb2.ToWorker] = field(default_factory=list)
    streams: list[MessageStream[worker_pb2.ToWorker]] = field(default_factory=list)

    async def serve(self, stream: MessageStream[worker_pb2.ToWorker]) -> None:
        self.streams.append(stream)
        for message in self.script:
            stream.send(message)
        with contextlib.suppress(StreamBroken):
            while (said := await stream.read()) is not None:
                self.heard.append(said)


@asynccontextmanager
async def scripted(
    *script: WorkerToRouter | worker_pb2.ToRouter,
) -> AsyncIterator[tuple[ScriptedWorker, WorkerRecord]]:
    worker = ScriptedWorker(
        [m if isinstance(m, worker_pb2.ToRouter) else to_router(m) for m in script]
    )
    listener = listen("127.0.0.1", 0)
    record = WorkerRecord(
        worker_id=WorkerId("w"),
        incarnation=Incarnation("i"),
        role=Role.PREFILL,
        epoch=1,
        address="",
        router_address=address_of(listener),
        model_id=MODEL,
        pid=1,
    )
    async with accepting(listener, worker_pb2.ToWorker.FromString, worker.serve):
        yield worker, record


async def test_a_newer_minor_version_and_its_messages_are_understood() -> None:
    newer = worker_pb2.ToRouter.FromString(NEWER_MESSAGE)
    hello = replace(HELLO, protocol_minor=99)
    async with scripted(hello, newer, LOAD) as (_, record), linked(record, MODEL) as link:
        await until(lambda: link.routable is not None, "the link routable")


@pytest.mark.parametrize(
    "first",
    [
        replace(HELLO, protocol_major=PROTOCOL_MAJOR + 1),
        replace(HELLO, model_id=ModelId("another")),
        replace(HELLO, incarnation=Incarnation("a later one")),
        LOAD,
        RouterRefused(reason="not you"),
    ],
    ids=["major version", "another model", "another incarnation", "no hello", "refused"],
)
async def test_a_worker_that_does_not_fit_is_not_routable_and_the_log_says_why_once(
    first: WorkerToRouter, caplog: pytest.LogCaptureFixture
) -> None:
    async with scripted(first, LOAD) as (_, record):
        link = make_link(record, MODEL)
        await soon(link.run())
        assert link.routable is None
        assert link.problem
        again = WorkerLink(record, "router", MODEL, 5.0, index=PrefixIndex(), before=link)
        assert again.problem == link.problem
        await soon(again.run())
    line = f"worker_not_reached worker_id=w reason={link.problem}"
    told = [r.levelname for r in caplog.records if r.getMessage() == line]
    assert told == ["WARNING"]


async def test_a_worker_that_nobody_finds_is_told_of_and_one_that_was_not_tried_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with scripted(HELLO) as (_, record):
        pass
    link = make_link(record, MODEL)
    await soon(link.run())
    assert "Connect call failed" in link.problem
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    caplog.clear()
    untried = asyncio.create_task(make_link(record, MODEL).run())
    await asyncio.sleep(0)
    untried.cancel()
    await asyncio.wait([untried])
    assert caplog.records == []


async def test_a_worker_that_says_nothing_more_is_lost() -> None:
    async with scripted(HELLO, LOAD) as (_, record):
        link = make_link(record, MODEL, silence_s=0.02)
        running = asyncio.create_task(link.run())
        await until(lambda: link.routable is not None, "the link routable")
        events = Events()
        link.submit(one_prefill(), events, 22, 22)
        await soon(running)
        assert link.routable is None
        assert "said nothing" in events.heard[0].message  # type: ignore[union-attr]


async def test_a_gap_in_the_cache_events_asks_for_a_snapshot() -> None:
    gap = KvEvents(first_number=5, events=(KvStored(parent=HASH, hashes=(HASH,)),))
    snapshot = KvSnapshot(next_number=1)
    async with scripted(HELLO, snapshot, gap) as (worker, record), linked(record, MODEL):
        await until(lambda: any(m.HasField("snapshot_request") for m in worker.heard))


# -- the fleet ----------------------------------------------------------------------------------


@asynccontextmanager
async def fleet_over(registry: MemoryRegistry, model: ModelId) -> AsyncIterator[Fleet]:
    fleet = Fleet(registry, router_id="router", model_id=model, silence_s=5.0)
    task = asyncio.create_task(fleet.run())
    try:
        yield fleet
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.wait([task])


def names(fleet: Fleet, role: Role = Role.PREFILL) -> list[str]:
    return list(fleet.pool(role).workers)


async def test_workers_are_routable_by_role() -> None:
    registry, hub = MemoryRegistry(SystemClock()), LoopbackHub()
    async with AsyncExitStack() as stack:
        served = [
            await stack.enter_async_context(served_worker(name, role, hub))
            for name, role in (("a", Role.PREFILL), ("b", Role.PREFILL), ("c", Role.DECODE))
        ]
        for each in served:
            await registry.register(each.record, 60.0)
        model = served[0].engine.info.model_id
        fleet = await stack.enter_async_context(fleet_over(registry, model))
        await until(lambda: names(fleet) == ["a", "b"] and names(fleet, Role.DECODE) == ["c"])
        assert fleet.link(Role.PREFILL, WorkerId("b")).record == served[1].record
        assert fleet.everyone.workers == ("a", "b", "c")


async def test_a_fleet_is_met_once_each_worker_is_connected_or_was_tried() -> None:
    registry, hub = MemoryRegistry(SystemClock()), LoopbackHub()
    async with AsyncExitStack() as stack:
        served = await stack.enter_async_context(served_worker("a", Role.PREFILL, hub))
        with listen("127.0.0.1", 0) as closed:
            gone = replace(served.record, worker_id=WorkerId("gone"), address=address_of(closed))
        for record in (served.record, replace(gone, incarnation=Incarnation("gone"))):
            await registry.register(record, 60.0)
        model = served.engine.info.model_id
        fleet = await stack.enter_async_context(fleet_over(registry, model))
        await soon(fleet.meet(10 * WAIT_S))
        assert fleet.everyone.workers == ("a",)
        assert all(link.view is not None or link.problem for link in fleet.links())
    async with fleet_over(MemoryRegistry(SystemClock()), MODEL) as alone:
        await soon(alone.meet(10 * WAIT_S))  # there is none to wait for


async def test_a_registry_that_does_not_answer_is_waited_for_so_long_at_most() -> None:
    registry = MemoryRegistry(SystemClock())
    fleet = Fleet(registry, router_id="router", model_id=MODEL, silence_s=5.0)
    await soon(fleet.meet(0.01))
    assert not fleet.links()


async def test_a_worker_of_another_model_keeps_its_reason_while_it_is_tried_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = MemoryRegistry(SystemClock())
    async with scripted(HELLO, LOAD) as (worker, record):
        await registry.register(record, 60.0)
        async with fleet_over(registry, ModelId("another")) as fleet:
            await until(lambda: len(worker.streams) >= 2, "a second try")
            (link,) = fleet.links()
            assert link.problem == "it serves model m, not another"
    assert caplog.text.count("it serves model m, not another") == 1


async def test_a_worker_missing_from_the_registry_stays_while_its_stream_lives() -> None:
    registry = MemoryRegistry(SystemClock(), sweep_s=0.005)
    async with served_worker("a", Role.PREFILL, LoopbackHub()) as served:
        await registry.register(served.record, 60.0)
        async with fleet_over(registry, served.engine.info.model_id) as fleet:
            await until(lambda: names(fleet) == ["a"])
            await registry.deregister(served.record.worker_id, served.record.incarnation)
            await until(lambda: not fleet._wanted, "the change seen")
            assert names(fleet) == ["a"]
            await served.stop_serving()
            await until(lambda: not fleet.links(), "the link dropped")


async def test_a_broken_stream_to_a_registered_worker_is_opened_again() -> None:
    registry = MemoryRegistry(SystemClock())
    async with scripted(HELLO, LOAD) as (worker, record):
        await registry.register(record, 60.0)
        async with fleet_over(registry, MODEL) as fleet:
            await until(lambda: names(fleet) == ["w"])
            worker.streams[0].abort()
            await until(
                lambda: len(worker.streams) == 2 and names(fleet) == ["w"], "a second stream"
            )
