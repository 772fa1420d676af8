"""How a worker stays registered."""

import asyncio
import logging

import pytest

from cluster.worker import host
from core.clock import SystemClock
from core.errors import Unavailable
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import MemoryRegistry, WorkerRecord

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
