import asyncio
from dataclasses import replace

from core.clock import FakeClock
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import MemoryRegistry, WorkerRecord
from tests.builders import soon

OLD, NEW = Incarnation("old"), Incarnation("new")


def record(worker_id: str = "w", incarnation: Incarnation = OLD) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(worker_id),
        incarnation=incarnation,
        role=Role.PREFILL,
        epoch=1,
        address="127.0.0.1:1",
        model_id=ModelId("m"),
        pid=1,
    )


async def test_a_record_not_renewed_disappears_at_its_ttl() -> None:
    clock = FakeClock()
    registry = MemoryRegistry(clock)
    await registry.register(record(), 10.0)
    clock.advance(9.9)
    assert await registry.workers() == (record(),)
    clock.advance(0.1)
    assert await registry.workers() == ()


async def test_registering_again_renews() -> None:
    clock = FakeClock()
    registry = MemoryRegistry(clock)
    await registry.register(record(), 10.0)
    clock.advance(9)
    await registry.register(record(), 10.0)
    clock.advance(9)
    assert await registry.workers() == (record(),)


async def test_a_new_incarnation_replaces_the_old_one() -> None:
    registry = MemoryRegistry(FakeClock())
    await registry.register(record(), 10.0)
    await registry.register(record(incarnation=NEW), 10.0)
    assert await registry.workers() == (record(incarnation=NEW),)


async def test_an_old_incarnation_cannot_deregister_the_new_one() -> None:
    registry = MemoryRegistry(FakeClock())
    await registry.register(record(incarnation=NEW), 10.0)
    await registry.deregister(WorkerId("w"), OLD)
    assert await registry.workers() == (record(incarnation=NEW),)
    await registry.deregister(WorkerId("w"), NEW)
    assert await registry.workers() == ()


async def test_a_watch_tells_the_present_and_every_change() -> None:
    registry = MemoryRegistry(FakeClock())
    await registry.register(record("a"), 10.0)
    watch = registry.watch()
    assert await soon(anext(watch)) == (record("a"),)
    await registry.register(record("b"), 10.0)
    assert await soon(anext(watch)) == (record("a"), record("b"))
    changed = replace(record("a"), role=Role.DECODE, epoch=2)
    await registry.register(changed, 10.0)
    assert await soon(anext(watch)) == (changed, record("b"))


async def test_a_watch_of_nobody_says_so_at_once() -> None:
    assert await soon(anext(MemoryRegistry(FakeClock()).watch())) == ()


async def test_a_renewal_is_no_change() -> None:
    registry = MemoryRegistry(FakeClock(), sweep_s=0.001)
    await registry.register(record(), 10.0)
    watch = registry.watch()
    await soon(anext(watch))
    waiting = asyncio.ensure_future(anext(watch))
    await registry.register(record(), 10.0)
    await asyncio.wait([waiting], timeout=0.02)
    assert not waiting.done()
    await registry.deregister(WorkerId("w"), OLD)
    assert await soon(waiting) == ()


async def test_a_watch_sees_an_expiry_that_nobody_reports() -> None:
    clock = FakeClock()
    registry = MemoryRegistry(clock, sweep_s=0.001)
    await registry.register(record(), 10.0)
    watch = registry.watch()
    await soon(anext(watch))
    clock.advance(10)
    assert await soon(anext(watch)) == ()
