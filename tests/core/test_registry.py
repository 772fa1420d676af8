"""What every Registry promises: in memory, over gRPC, and in a real Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass, replace

import pytest

from cluster.redis_registry import RedisRegistry
from cluster.registry_client import RegistryClient
from cluster.registry_server import serve_registry
from core.clock import FakeClock
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import MAX_TTL_S, MemoryRegistry, Registry, WorkerRecord
from tests.builders import soon
from tests.redis_server import RedisServer, redis_server

OLD, NEW = Incarnation("old"), Incarnation("new")
TTL_S = 100.0
SWEEP_S = 0.01
KINDS = ("memory", "grpc", "redis")


def record(worker_id: str = "w", incarnation: Incarnation = OLD) -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(worker_id),
        incarnation=incarnation,
        role=Role.PREFILL,
        epoch=1,
        address="127.0.0.1:1",
        router_address="127.0.0.1:1",
        model_id=ModelId("m"),
        pid=1,
    )


@dataclass(frozen=True, slots=True)
class Subject:
    """A registry, a second view of the same one, and a way to let time pass in it."""

    registry: Registry
    other: Registry
    advance: Callable[[float], None]


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture(params=KINDS)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    clock = FakeClock()
    memory = MemoryRegistry(clock, sweep_s=SWEEP_S)
    async with AsyncExitStack() as stack:
        if request.param == "memory":
            yield Subject(memory, memory, clock.advance)
        elif request.param == "grpc":
            address = await stack.enter_async_context(serve_registry(memory, "127.0.0.1:0"))
            first, second = [
                await stack.enter_async_context(RegistryClient(address)) for _ in range(2)
            ]
            yield Subject(first, second, clock.advance)
        else:
            server: RedisServer = request.getfixturevalue("redis")
            cluster = request.node.name.translate(str.maketrans("[]", "--"))[-64:]
            one, two = [
                await stack.enter_async_context(
                    RedisRegistry(server.url, cluster, reread_s=SWEEP_S)
                )
                for _ in range(2)
            ]
            yield Subject(one, two, lambda seconds: shorten_leases(server, seconds))


def shorten_leases(server: RedisServer, seconds: float) -> None:
    """What `seconds` would have done, without waiting for them."""
    with closing(server.client) as client:
        for key in client.scan_iter("*:worker:*"):
            client.pexpire(key, client.pttl(key) - round(seconds * 1000))


async def test_a_registered_worker_is_seen_with_every_field(subject: Subject) -> None:
    await subject.registry.register(record(), TTL_S)
    assert await subject.other.workers() == (record(),)


async def test_a_record_not_renewed_disappears_at_its_ttl(subject: Subject) -> None:
    await subject.registry.register(record(), TTL_S)
    subject.advance(TTL_S - 10)
    assert await subject.registry.workers() == (record(),)
    subject.advance(10)
    assert await subject.registry.workers() == ()


async def test_the_longest_ttl_is_taken(subject: Subject) -> None:
    await subject.registry.register(record(), MAX_TTL_S)
    assert await subject.registry.workers() == (record(),)


async def test_registering_again_renews(subject: Subject) -> None:
    await subject.registry.register(record(), TTL_S)
    subject.advance(TTL_S - 10)
    await subject.registry.register(record(), TTL_S)
    subject.advance(TTL_S - 10)
    assert await subject.registry.workers() == (record(),)


async def test_a_worker_that_expired_may_register_again(subject: Subject) -> None:
    await subject.registry.register(record(), TTL_S)
    subject.advance(TTL_S)
    assert await subject.registry.workers() == ()
    await subject.registry.register(record(), TTL_S)
    assert await subject.registry.workers() == (record(),)


async def test_a_new_incarnation_replaces_the_old_one(subject: Subject) -> None:
    await subject.registry.register(record(), TTL_S)
    await subject.other.register(record(incarnation=NEW), TTL_S)
    assert await subject.registry.workers() == (record(incarnation=NEW),)


async def test_an_old_incarnation_cannot_deregister_the_new_one(subject: Subject) -> None:
    await subject.registry.register(record(incarnation=NEW), TTL_S)
    await subject.other.deregister(WorkerId("w"), OLD)
    assert await subject.registry.workers() == (record(incarnation=NEW),)
    await subject.other.deregister(WorkerId("w"), NEW)
    assert await subject.registry.workers() == ()


async def test_a_deregister_of_nobody_does_nothing(subject: Subject) -> None:
    await subject.registry.deregister(WorkerId("w"), OLD)
    assert await subject.registry.workers() == ()


async def test_a_watch_tells_the_present_and_every_change(subject: Subject) -> None:
    await subject.registry.register(record("a"), TTL_S)
    watch = subject.registry.watch()
    assert await soon(anext(watch)) == (record("a"),)
    await subject.other.register(record("b"), TTL_S)
    assert await soon(anext(watch)) == (record("a"), record("b"))
    changed = replace(record("a"), role=Role.DECODE, epoch=2)
    await subject.other.register(changed, TTL_S)
    assert await soon(anext(watch)) == (changed, record("b"))
    await subject.other.deregister(WorkerId("a"), OLD)
    assert await soon(anext(watch)) == (record("b"),)
    await end(watch)


async def test_a_watch_of_nobody_says_so_at_once(subject: Subject) -> None:
    watch = subject.registry.watch()
    assert await soon(anext(watch)) == ()
    await end(watch)


async def test_a_renewal_is_no_change(subject: Subject) -> None:
    await subject.registry.register(record(), TTL_S)
    watch = subject.registry.watch()
    await soon(anext(watch))
    waiting = asyncio.ensure_future(anext(watch))
    await subject.other.register(record(), TTL_S)
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    await subject.other.deregister(WorkerId("w"), OLD)
    assert await soon(waiting) == ()
    await end(watch)


async def test_a_watch_sees_an_expiry_that_nobody_reports(subject: Subject) -> None:
    await subject.registry.register(record(), TTL_S)
    watch = subject.registry.watch()
    await soon(anext(watch))
    subject.advance(TTL_S)
    assert await soon(anext(watch)) == ()
    await end(watch)


async def test_two_watches_each_hear_everything(subject: Subject) -> None:
    watches = subject.registry.watch(), subject.other.watch()
    for watch in watches:
        assert await soon(anext(watch)) == ()
    await subject.registry.register(record(), TTL_S)
    for watch in watches:
        assert await soon(anext(watch)) == (record(),)
        await end(watch)


async def end(watch: AsyncIterator[tuple[WorkerRecord, ...]]) -> None:
    await watch.aclose()  # type: ignore[attr-defined]
