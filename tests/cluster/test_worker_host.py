"""How a worker stays registered."""

import asyncio
import logging
from pathlib import Path

import grpc
import pytest

from cluster.worker import host
from cluster.worker.host import WorkerStart, serve_worker
from core.clock import SystemClock
from core.errors import ConfigError, Unavailable
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.messages import PROTOCOL_MAJOR
from core.registry import MemoryRegistry, WorkerRecord
from core.stream import dial
from kv_transfer.loopback import LoopbackHub, LoopbackTransport
from kv_transfer.transports import Transports
from router.codec import to_worker
from tests.builders import (
    StepGate,
    make_engine,
    make_prompt,
    make_settings,
    prefill_submit,
    soon,
    until,
)
from wire import common_pb2, worker_pb2

RECORD = WorkerRecord(
    worker_id=WorkerId("decode-0"),
    incarnation=Incarnation("one"),
    role=Role.DECODE,
    epoch=1,
    address="x",
    router_address="x",
    model_id=ModelId("m"),
    pid=7,
)


class Away(MemoryRegistry):
    """Does not answer so many times, then does."""

    def __init__(self, failures: int) -> None:
        super().__init__(SystemClock())
        self.left = failures
        self.back = asyncio.Event()

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise TimeoutError
        if self.left > 0:
            raise Unavailable("Redis is away")
        await super().register(record, ttl_s)
        self.back.set()


async def test_a_registry_that_is_away_is_said_now_and_then_and_that_it_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "_REGISTER_TTL_S", 0.003)
    caplog.set_level(logging.WARNING)
    registry = Away(failures=37)
    task = asyncio.create_task(host._stay_registered(registry, RECORD))
    async with asyncio.timeout(20):
        await registry.back.wait()
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.wait([task])
    first, second, third, back = [record.getMessage() for record in caplog.records]
    assert "worker_id=decode-0 failures=1 reason='Redis is away': it serves on" in first
    assert "failures=19 " in second
    assert "failures=37 reason='nothing came within 3 s'" in third
    assert back == "registry_back worker_id=decode-0 failures=37"


class FailsAtLast(StepGate):
    """An engine whose first step ends when it is let go, with a fault of the whole engine."""

    def __call__(self, seconds: float) -> None:
        super().__call__(seconds)
        raise RuntimeError("the device is gone")


def a_start(host: str = "127.0.0.1") -> WorkerStart:
    return WorkerStart(
        worker_id=WorkerId("p"),
        role=Role.PREFILL,
        model_path=Path(),
        settings=make_settings(),
        drain_s=3600.0,
        host=host,
    )


async def served(
    start: WorkerStart,
    stop: asyncio.Event,
    ready: "asyncio.Future[WorkerRecord] | None" = None,
) -> None:
    await serve_worker(
        start,
        registry=None,
        clock=SystemClock(),
        stop=stop,
        on_ready=ready.set_result if ready is not None else lambda record: None,
        transports_of=lambda _config, arena, _life, _host: Transports(
            [LoopbackTransport(arena, LoopbackHub())]
        ),
    )


@pytest.mark.parametrize("every", ["", "0.0.0.0", "::"])
async def test_a_host_that_nobody_could_be_told_is_refused(every: str) -> None:
    with pytest.raises(ConfigError, match="give one address that they reach"):
        await soon(served(a_start(host=every), asyncio.Event()))


async def test_a_worker_is_reached_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, stop = make_settings(), asyncio.Event()
    engine = make_engine(config=settings.engine)
    monkeypatch.setattr(host, "build_engine", lambda _path, _config: engine)
    ready: asyncio.Future[WorkerRecord] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(served(a_start(host="::1"), stop, ready))
    async with asyncio.timeout(20):
        record = await ready
        assert record.address.startswith("[::1]:")
        async with dial(record.router_address, worker_pb2.ToRouter.FromString) as stream:
            protocol = common_pb2.Protocol(major=PROTOCOL_MAJOR)
            stream.send(worker_pb2.ToWorker(hello=worker_pb2.RouterHello(protocol=protocol)))
            hello = await stream.read()
        async with grpc.aio.insecure_channel(record.address) as channel:
            await channel.channel_ready()
    assert hello is not None
    assert hello.hello.worker_id == "p"
    stop.set()
    await soon(serving)


async def test_an_engine_that_fails_while_the_worker_drains_ends_the_worker_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate, stop = FailsAtLast(), asyncio.Event()
    settings = make_settings()
    engine = make_engine(config=settings.engine, sleep=gate)
    monkeypatch.setattr(host, "build_engine", lambda _path, _config: engine)
    ready: asyncio.Future[WorkerRecord] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(served(a_start(), stop, ready))
    async with (
        asyncio.timeout(20),
        dial((await ready).router_address, worker_pb2.ToRouter.FromString) as stream,
    ):
        protocol = common_pb2.Protocol(major=PROTOCOL_MAJOR)
        stream.send(worker_pb2.ToWorker(hello=worker_pb2.RouterHello(protocol=protocol)))
        stream.send(to_worker(prefill_submit(1, make_prompt(22))))
        await until(gate.waiting.is_set, "a step in flight")
        stop.set()
        while (message := await stream.read()) is not None and not message.load.draining:
            pass
        gate.open()
        with pytest.raises(ExceptionGroup) as failed:
            await soon(serving)
    assert failed.group_contains(RuntimeError, match="the device is gone")
