"""Which way two workers use, and what becomes of a worker that loses one."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from core.errors import ConfigError, TransferCause, TransferFailed
from core.ids import ShardId, new_incarnation
from engine.arena import Arena
from kv_transfer import transports as transports_module
from kv_transfer.config import TransferConfig
from kv_transfer.loopback import LoopbackHub, LoopbackTransport
from kv_transfer.transports import Transports, common_way, make_transports
from tests.builders import soon, until
from tests.kv_transfer.transport_sides import BLOCK_BYTES, LAYOUT, make_plan

PEER, OTHER = ShardId("peer/0"), ShardId("other/0")
ONE_BLOCK = make_plan([(0, 0, BLOCK_BYTES)])


class NamedWay(LoopbackTransport):
    """A real transport under another name, whose failure a test brings about."""

    def __init__(self, name: str, hub: LoopbackHub, fill: int) -> None:
        self.arena = Arena(LAYOUT, 1)
        self.arena.data.fill_(fill)
        self.name = name
        super().__init__(self.arena, hub)
        self.broken: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        self.closed = False

    @property
    def holds(self) -> int:
        """The byte that fills the arena."""
        (byte,) = self.arena.data.unique().tolist()
        return int(byte)

    async def failed(self) -> Exception:
        return await asyncio.shield(self.broken)

    async def close(self) -> None:
        self.closed = True
        await super().close()


class Worker:
    """Its ways, each with an arena of its own, so that a test sees which one was used."""

    def __init__(self, hub: LoopbackHub, **ways: int) -> None:
        self.ways = {name: NamedWay(name, hub, fill) for name, fill in ways.items()}
        self.transports = Transports(list(self.ways.values()))

    async def connect(self, peer: ShardId, owner: "Worker") -> str:
        return await self.transports.connect(peer, owner.transports.memories())

    async def read(self, peer: ShardId) -> None:
        await soon(self.transports.start_read(peer, ONE_BLOCK))


def a_bug() -> None:
    raise RuntimeError("a bug")


async def raising() -> None:
    a_bug()


# -- the choice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mine", "theirs", "way"),
    [
        (["nixl", "collective"], ["nixl", "collective"], "nixl"),
        (["nixl", "collective"], ["collective", "nixl"], "nixl"),
        (["nixl", "collective"], ["collective"], "collective"),
        (["collective"], ["nixl", "collective"], "collective"),
    ],
)
def test_the_first_of_mine_that_the_peer_has_too(
    mine: list[str], theirs: list[str], way: str
) -> None:
    assert common_way(mine, theirs) == way


@pytest.mark.parametrize(
    ("mine", "theirs", "says"),
    [
        (["nixl"], ["collective"], "the peer offers collective, this worker nixl"),
        (["nixl", "collective"], [], "the peer offers none, this worker nixl, collective"),
        ([], ["nixl"], "the peer offers nixl, this worker none"),
    ],
)
def test_no_way_in_common_names_both_lists_and_the_setting(
    mine: list[str], theirs: list[str], says: str
) -> None:
    with pytest.raises(TransferFailed, match=says) as failure:
        common_way(mine, theirs)
    assert failure.value.cause is TransferCause.NO_TRANSPORT
    assert "transfer.backend" in failure.value.message


# -- routes -------------------------------------------------------------------------------------


async def test_every_peer_is_read_by_the_way_they_have_in_common() -> None:
    hub = LoopbackHub()
    reader = Worker(hub, pigeon=0, raven=0)
    assert await reader.connect(PEER, Worker(hub, raven=1, pigeon=2)) == "pigeon"
    assert await reader.connect(OTHER, Worker(hub, raven=3)) == "raven"
    await reader.read(PEER)
    await reader.read(OTHER)
    assert (reader.ways["pigeon"].holds, reader.ways["raven"].holds) == (2, 3)


async def test_memories_are_offered_best_first() -> None:
    worker = Worker(LoopbackHub(), pigeon=0, raven=0)
    assert worker.transports.names == ("pigeon", "raven")
    assert [m.transport for m in worker.transports.memories()] == ["pigeon", "raven"]


async def test_without_a_way_in_common_nothing_is_connected() -> None:
    hub = LoopbackHub()
    reader = Worker(hub, pigeon=0)
    with pytest.raises(TransferFailed, match="the peer offers raven, this worker pigeon"):
        await reader.connect(PEER, Worker(hub, raven=1))
    with pytest.raises(TransferFailed, match="not connected to peer/0") as failure:
        await reader.read(PEER)
    assert failure.value.cause is TransferCause.READ_FAILED


async def test_a_disconnected_peer_is_not_read_and_others_are() -> None:
    hub = LoopbackHub()
    reader, owner = Worker(hub, pigeon=0), Worker(hub, pigeon=1)
    for peer in (PEER, OTHER):
        await reader.connect(peer, owner)
    for _ in range(2):
        await reader.transports.disconnect(PEER)
    with pytest.raises(TransferFailed, match="not connected"):
        await reader.read(PEER)
    await reader.read(OTHER)


@pytest.mark.parametrize("error", [TransferFailed("injected"), ValueError("a bug")])
async def test_a_way_that_raises_where_it_must_not_is_heard_as_a_failed_read(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start_read(_peer: ShardId, _plan: object, _sealed: object) -> None:
        raise error

    hub = LoopbackHub()
    reader = Worker(hub, pigeon=0)
    await reader.connect(PEER, Worker(hub, pigeon=1))
    monkeypatch.setattr(reader.ways["pigeon"], "start_read", start_read)
    read = reader.transports.start_read(PEER, ONE_BLOCK)
    with pytest.raises(type(error)) as raised:
        await read
    assert raised.value is error


async def test_close_closes_every_way() -> None:
    worker = Worker(LoopbackHub(), pigeon=0, raven=0)
    await worker.transports.close()
    assert [way.closed for way in worker.ways.values()] == [True, True]


async def test_a_way_that_cannot_tell_its_memory_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(LoopbackHub(), pigeon=0, raven=0)
    monkeypatch.setattr(worker.ways["pigeon"], "memory", a_bug)
    assert [m.transport for m in worker.transports.memories()] == ["raven"]
    assert "transport_bug name=pigeon" in caplog.text


@pytest.mark.parametrize("error", [TransferFailed("injected"), ValueError("a bug")])
async def test_a_peer_is_forgotten_though_its_way_raises(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def disconnect(_peer: ShardId) -> None:
        raise error

    hub = LoopbackHub()
    reader = Worker(hub, pigeon=0)
    await reader.connect(PEER, Worker(hub, pigeon=1))
    monkeypatch.setattr(reader.ways["pigeon"], "disconnect", disconnect)
    await reader.transports.disconnect(PEER)
    with pytest.raises(TransferFailed, match="not connected"):
        await reader.read(PEER)


async def test_a_way_that_does_not_close_leaves_none_of_the_others_open(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(LoopbackHub(), pigeon=0, owl=0, raven=0)
    monkeypatch.setattr(worker.ways["pigeon"], "close", raising)
    monkeypatch.setattr(worker.ways["owl"], "close", asyncio.Event().wait)
    monkeypatch.setattr(transports_module, "CLOSE_TIMEOUT_S", 0.05)
    await worker.transports.close()
    assert worker.ways["raven"].closed
    assert "transport_bug name=pigeon" in caplog.text
    assert "transport_not_closed name=owl" in caplog.text


# -- a way fails --------------------------------------------------------------------------------


@asynccontextmanager
async def watched(worker: Worker) -> AsyncIterator["asyncio.Task[Exception]"]:
    watch = asyncio.create_task(worker.transports.failed())
    try:
        yield watch
    finally:
        watch.cancel()
        await asyncio.wait([watch])


async def test_a_failed_way_is_dropped_and_its_peers_connect_by_the_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = LoopbackHub()
    worker, owner = Worker(hub, pigeon=0, raven=0), Worker(hub, pigeon=1, raven=2)
    async with watched(worker) as watch:
        await worker.connect(PEER, owner)
        worker.ways["pigeon"].broken.set_result(RuntimeError("shot down"))
        await until(lambda: worker.ways["pigeon"].closed, "the failed way is closed")
        assert worker.transports.names == ("raven",)
        assert worker.transports.started == ("pigeon", "raven")
        assert [m.transport for m in worker.transports.memories()] == ["raven"]
        with pytest.raises(TransferFailed, match="not connected"):
            await worker.read(PEER)
        assert await worker.connect(PEER, owner) == "raven"
        await worker.read(PEER)
        assert worker.ways["raven"].holds == 2
        assert not watch.done()
    assert "transport_failed name=pigeon error=shot down" in caplog.text


async def test_a_way_whose_watch_raises_or_that_does_not_close_is_dropped_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(LoopbackHub(), pigeon=0, owl=0, raven=0)
    monkeypatch.setattr(worker.ways["pigeon"], "close", raising)
    async with watched(worker) as watch:
        worker.ways["pigeon"].broken.set_exception(RuntimeError("a bug"))
        worker.ways["owl"].broken.set_result(RuntimeError("shot down"))
        await until(lambda: worker.transports.names == ("raven",), "both are dropped")
        await until(lambda: worker.ways["owl"].closed, "the failed way is closed")
        assert not watch.done()


async def test_the_failure_of_the_last_way_is_the_workers() -> None:
    worker = Worker(LoopbackHub(), pigeon=0, raven=0)
    first, last = RuntimeError("first"), RuntimeError("last")
    async with watched(worker) as watch:
        worker.ways["raven"].broken.set_result(first)
        await until(lambda: worker.ways["raven"].closed, "the failed way is closed")
        worker.ways["pigeon"].broken.set_result(last)
        assert await soon(watch) is last


async def test_ways_that_fail_together_end_the_worker() -> None:
    worker = Worker(LoopbackHub(), pigeon=0, raven=0)
    for way in worker.ways.values():
        way.broken.set_result(RuntimeError("storm"))
    assert isinstance(await soon(worker.transports.failed()), RuntimeError)


# -- what the setting starts --------------------------------------------------------------------


@asynccontextmanager
async def made(backend: str, host: str = "127.0.0.1") -> AsyncIterator[Transports]:
    config = TransferConfig.model_validate({"backend": backend})
    transports = make_transports(config, Arena(LAYOUT, 1), new_incarnation(), host)
    try:
        yield transports
    finally:
        await transports.close()


@pytest.mark.parametrize(
    ("backend", "names"),
    [
        ("auto", ("nixl", "collective")),
        ("nixl", ("nixl",)),
        ("collective", ("collective",)),
        ("loopback", ("loopback",)),
    ],
)
async def test_the_backend_asked_for_is_started_and_said(
    backend: str, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with made(backend) as transports:
        assert transports.names == names
    for name in names:
        assert f"transport_ready name={name} backend={backend}" in caplog.text


def without_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where the package is not installed."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "nixl":
            monkeypatch.setitem(sys.modules, name, None)
        elif name.startswith("kv_transfer.nixl"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nixl", None)


async def test_auto_serves_without_nixl_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    without_nixl(monkeypatch)
    async with made("auto") as transports:
        assert transports.names == ("collective",)
    assert "transport_unavailable name=nixl reason=import of nixl" in caplog.text


async def test_nixl_asked_for_and_missing_is_a_bad_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    without_nixl(monkeypatch)
    with pytest.raises(ConfigError, match=r"transfer\.backend is nixl.*nixl: import of nixl"):
        async with made("nixl"):
            pass


async def test_a_host_nobody_can_listen_on_is_a_bad_set_up() -> None:
    with pytest.raises(ConfigError, match=r"collective: .*203\.0\.113\.1"):
        async with made("collective", host="203.0.113.1"):
            pass


@pytest.mark.parametrize("backend", ["collective", "nixl"])
async def test_two_workers_of_one_backend_read_each_other(backend: str) -> None:
    async with made(backend) as reader, made("auto") as owner:
        assert await reader.connect(PEER, owner.memories()) == backend
        await soon(reader.start_read(PEER, ONE_BLOCK))


async def test_loopback_workers_that_share_a_hub_read_each_other() -> None:
    hub, config = LoopbackHub(), TransferConfig(backend="loopback")
    one, two = (
        make_transports(config, Arena(LAYOUT, 1), new_incarnation(), "127.0.0.1", hub=hub)
        for _ in range(2)
    )
    assert await one.connect(PEER, two.memories()) == "loopback"
    await soon(one.start_read(PEER, ONE_BLOCK))
