"""The registry in a real redis-server: outages, restarts, and traffic that does not notice.

tests/core/test_registry.py has what every registry promises.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, closing
from itertools import count

import pytest

from cluster.config import ClusterConfig, RegistryConfig
from cluster.redis_registry import RedisRegistry, without_password
from cluster.registries import connect_registry, registry_problems
from cluster.registry_client import RegistryClient
from cluster.worker import host
from core.errors import Unavailable
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import WorkerRecord
from router.fleet import Fleet
from tests.builders import (
    Cluster,
    expected_tokens,
    make_request,
    running_cluster,
    served_worker,
    soon,
    until,
)
from tests.redis_server import RedisServer, redis_server

TTL_S = 100.0
PROMPT = list(range(1, 14))
Records = tuple[WorkerRecord, ...]


def record(worker_id: str = "decode-0", incarnation: str = "one") -> WorkerRecord:
    return WorkerRecord(
        worker_id=WorkerId(worker_id),
        incarnation=Incarnation(incarnation),
        role=Role.DECODE,
        epoch=3,
        address="127.0.0.1:5000",
        router_address="127.0.0.1:5000",
        model_id=ModelId("model"),
        pid=42,
    )


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    """For tests that leave it running."""
    with redis_server() as server:
        yield server


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)[-64:]


def registry_of(
    server: RedisServer, cluster: str = "test", call_timeout_s: float = 5.0
) -> RedisRegistry:
    return RedisRegistry(server.url, cluster, call_timeout_s=call_timeout_s, reread_s=0.02)


# -- leases and changes -------------------------------------------------------------------------


async def test_redis_itself_ends_a_lease(shared: RedisServer, cluster: str) -> None:
    async with registry_of(shared, cluster) as registry, aclosing(registry.watch()) as watch:
        await registry.register(record(), 0.2)
        while await soon(anext(watch)) != (record(),):
            pass
        assert await soon(anext(watch)) == ()


async def test_a_change_is_told_and_not_found_by_the_next_reading(
    shared: RedisServer, cluster: str
) -> None:
    async with (
        RedisRegistry(shared.url, cluster, reread_s=1000.0) as registry,
        registry_of(shared, cluster) as worker,
        aclosing(registry.watch()) as watch,
    ):
        assert await soon(anext(watch)) == ()
        await worker.register(record(), TTL_S)
        assert await soon(anext(watch)) == (record(),)
        await worker.deregister(record().worker_id, record().incarnation)
        assert await soon(anext(watch)) == ()


async def test_a_change_that_nobody_told_is_found_by_the_next_reading(
    shared: RedisServer, cluster: str
) -> None:
    async with registry_of(shared, cluster) as registry, aclosing(registry.watch()) as watch:
        await registry.register(record(), TTL_S)
        assert await soon(anext(watch)) == (record(),)
        with closing(shared.client) as client:
            client.delete(f"{{baton:{cluster}}}:worker:decode-0")
        assert await soon(anext(watch)) == ()


async def test_ids_of_expired_leases_do_not_pile_up(shared: RedisServer, cluster: str) -> None:
    async with registry_of(shared, cluster) as registry:
        for number in range(5):
            await registry.register(record(f"decode-{number}"), TTL_S)
        with closing(shared.client) as client:
            for number in range(1, 5):
                client.delete(f"{{baton:{cluster}}}:worker:decode-{number}")
            assert await registry.workers() == (record("decode-0"),)
            assert client.smembers(f"{{baton:{cluster}}}:workers") == {b"decode-0"}


async def test_an_id_that_is_no_text_is_forgotten(shared: RedisServer, cluster: str) -> None:
    async with registry_of(shared, cluster) as registry:
        await registry.register(record(), TTL_S)
        with closing(shared.client) as client:
            client.sadd(f"{{baton:{cluster}}}:workers", b"\xff\xfe")
            assert await registry.workers() == (record(),)
            assert client.smembers(f"{{baton:{cluster}}}:workers") == {b"decode-0"}


async def test_every_key_of_a_cluster_expires(shared: RedisServer, cluster: str) -> None:
    async with registry_of(shared, cluster) as registry:
        await registry.check()
        await registry.register(record(), TTL_S)
    with closing(shared.client) as client:
        keys = list(client.scan_iter(f"{{baton:{cluster}}}:*"))
        assert len(keys) == 3
        assert all(client.pttl(key) > 0 for key in keys)


async def test_clusters_of_other_names_do_not_see_each_other(
    shared: RedisServer, cluster: str
) -> None:
    async with registry_of(shared, cluster) as one, registry_of(shared, "other") as other:
        await one.register(record(), TTL_S)
        await other.deregister(record().worker_id, record().incarnation)
        assert await one.workers() == (record(),)
        assert await other.workers() == ()


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b'{"worker_id": "new"}',
        b'{"worker_id":"new","incarnation":"i","role":"conductor","epoch":1,"address":"a:1",'
        b'"model_id":"m","pid":1}',
    ],
)
async def test_a_record_of_another_version_is_left_out(shared: RedisServer, text: bytes) -> None:
    cluster = "versions"
    async with registry_of(shared, cluster) as registry:
        await registry.register(record("new"), TTL_S)
        await registry.register(record(), TTL_S)
        with closing(shared.client) as client:
            client.set(f"{{baton:{cluster}}}:worker:new", text)
        assert await registry.workers() == (record(),)


async def test_a_field_of_a_later_version_is_skipped(shared: RedisServer, cluster: str) -> None:
    async with registry_of(shared, cluster) as registry:
        await registry.register(record(), TTL_S)
        key = f"{{baton:{cluster}}}:worker:decode-0"
        with closing(shared.client) as client:
            text = client.get(key)
            assert isinstance(text, bytes)
            client.set(key, text.replace(b'{"', b'{"zone":"a","', 1))
        assert await registry.workers() == (record(),)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), 1e9])
async def test_a_ttl_out_of_bounds_is_refused(shared: RedisServer, ttl_s: float) -> None:
    async with registry_of(shared) as registry:
        with pytest.raises(ValueError, match="ttl_s must be in"):
            await registry.register(record(), ttl_s)


async def test_a_watch_ends_at_whatever_step_it_is_cancelled(
    shared: RedisServer, cluster: str
) -> None:
    async def follow(registry: RedisRegistry) -> None:
        async for _ in registry.watch():
            pass

    async with registry_of(shared, cluster) as registry:
        await registry.register(record(), TTL_S)
        for steps in range(100):
            watching = asyncio.create_task(follow(registry))
            for _ in range(steps):
                await asyncio.sleep(0)
            watching.cancel()
            await asyncio.wait([watching], timeout=5)
            assert watching.done(), f"lost after {steps} steps"


# -- outages ------------------------------------------------------------------------------------


async def test_a_redis_that_is_away_is_unavailable_in_bounded_time(server: RedisServer) -> None:
    async with registry_of(server, call_timeout_s=0.3) as registry:
        await registry.register(record(), TTL_S)
        server.freeze()
        with pytest.raises(Unavailable, match="does not answer"):
            await soon(registry.workers())
        server.kill()
        with pytest.raises(Unavailable, match="does not answer"):
            await soon(registry.register(record(), TTL_S))


async def test_a_client_outlives_a_restart(server: RedisServer) -> None:
    async with registry_of(server) as registry:
        await registry.register(record(), TTL_S)
        server.kill()
        server.start()
        assert await registry.workers() == ()
        await registry.register(record(), TTL_S)
        assert await registry.workers() == (record(),)


async def test_a_watch_says_nothing_while_redis_is_frozen(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cluster.redis_registry")
    async with (
        registry_of(server, call_timeout_s=0.3) as registry,
        aclosing(registry.watch()) as watch,
    ):
        await registry.register(record(), TTL_S)
        assert await soon(anext(watch)) == (record(),)
        server.freeze()
        waiting = asyncio.ensure_future(anext(watch))
        await until(lambda: "registry_lost" in caplog.text)
        server.thaw()
        await until(lambda: "registry_back" in caplog.text)
        assert not waiting.done()
        await registry.register(record("decode-1"), TTL_S)
        assert await soon(waiting) == (record("decode-0"), record("decode-1"))


async def test_a_watch_says_that_redis_came_back_empty(server: RedisServer) -> None:
    async with registry_of(server) as registry, aclosing(registry.watch()) as watch:
        await registry.register(record(), TTL_S)
        assert await soon(anext(watch)) == (record(),)
        server.kill()
        server.start()
        assert await soon(anext(watch)) == ()
        await registry.register(record("decode-1"), TTL_S)
        assert await soon(anext(watch)) == (record("decode-1"),)


async def test_a_watch_may_begin_before_redis(server: RedisServer) -> None:
    server.kill()
    async with registry_of(server) as registry, aclosing(registry.watch()) as watch:
        first = asyncio.ensure_future(anext(watch))
        await asyncio.wait([first], timeout=0.05)
        server.start()
        assert await soon(first) == ()


# -- traffic ------------------------------------------------------------------------------------


@asynccontextmanager
async def cluster_with(registry: RedisRegistry) -> AsyncIterator[Cluster]:
    """Two and two workers that keep themselves registered, and a flow to them."""
    async with running_cluster(registry=registry) as cluster:
        tasks = [
            asyncio.create_task(host._stay_registered(registry, served.record))
            for served in [*cluster.prefill, *cluster.decode]
        ]
        try:
            yield cluster
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_REGISTER_TTL_S", 0.3)


async def answers(cluster: Cluster, numbers: Iterator[int]) -> None:
    request = make_request(PROMPT, name=f"req-{next(numbers)}", max_tokens=8)
    items = [item async for item in cluster.flow.generate(request)]
    assert [token for item in items for token in item.tokens] == expected_tokens(PROMPT, 8)


def known(fleet: Fleet) -> set[str]:
    return {worker_id for role in Role for worker_id in fleet.pool(role).workers}


@pytest.mark.usefixtures("short_leases")
@pytest.mark.parametrize("outage", ["killed", "frozen"])
async def test_traffic_goes_on_without_redis_and_after_it_came_back(
    server: RedisServer, outage: str
) -> None:
    async with AsyncExitStack() as stack:
        registry = await stack.enter_async_context(registry_of(server, call_timeout_s=1.0))
        cluster = await stack.enter_async_context(cluster_with(registry))
        numbers, everyone = count(), known(cluster.fleet)
        assert len(everyone) == 4
        await answers(cluster, numbers)

        server.kill() if outage == "killed" else server.freeze()
        late = await stack.enter_async_context(served_worker("late", Role.DECODE, cluster.hub))
        staying = asyncio.create_task(host._stay_registered(registry, late.record))
        stack.push_async_callback(ended, staying)
        for _ in range(20):
            await answers(cluster, numbers)
        assert known(cluster.fleet) == everyone

        server.start() if outage == "killed" else server.thaw()
        await until(lambda: known(cluster.fleet) == everyone | {"late"}, "the late one is found")
        await answers(cluster, numbers)
        await until_registered(registry, 5)


async def test_an_empty_redis_takes_no_worker_away_while_its_stream_lives(
    server: RedisServer,
) -> None:
    async with registry_of(server) as registry, running_cluster(registry=registry) as cluster:
        everyone = known(cluster.fleet)
        server.kill()
        server.start()
        await until(lambda: not cluster.fleet._wanted, "the emptiness is seen")
        assert known(cluster.fleet) == everyone
        await answers(cluster, count())


async def until_registered(registry: RedisRegistry, number: int) -> None:
    async def wait() -> None:
        while len(await registry.workers()) != number:
            await asyncio.sleep(0.01)

    await soon(wait())


async def ended(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


# -- the start ----------------------------------------------------------------------------------


def redis_config(url: str, cluster: str = "default") -> RegistryConfig:
    return RegistryConfig(kind="redis", url=url, cluster=cluster)


def test_a_redis_that_is_not_there_is_told_with_the_next_step(server: RedisServer) -> None:
    server.kill()
    (problem,) = registry_problems(redis_config(server.url), ())
    assert f"Redis at {server.url} does not answer" in problem
    assert "correct registry.url, or set registry.kind to embedded" in problem


def test_a_redis_that_is_there_is_no_problem(shared: RedisServer) -> None:
    assert registry_problems(redis_config(shared.url), (WorkerId("decode-0"),)) == []


def test_a_wrong_password_is_told_and_not_shown() -> None:
    with redis_server(password="secret") as server:
        assert registry_problems(redis_config(server.url), ()) == []
        wrong = server.url.replace("secret", "guess")
        (problem,) = registry_problems(redis_config(wrong), ())
    assert "refuses" in problem
    assert "guess" not in problem


def test_a_second_cluster_of_one_name_is_told(
    shared: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def occupy() -> None:
        async with registry_of(shared, "taken") as registry:
            await registry.register(record(), TTL_S)

    monkeypatch.setattr("cluster.registries._LAST_LEASES_S", 0.0)
    asyncio.run(occupy())
    config = redis_config(shared.url, "taken")
    (problem,) = registry_problems(config, (WorkerId("decode-0"),))
    assert "registry.cluster taken is in use" in problem
    assert registry_problems(config, (WorkerId("decode-9"),)) == []


def test_last_leases_of_a_killed_cluster_are_waited_for(shared: RedisServer) -> None:
    async def leave() -> None:
        async with registry_of(shared, "killed") as registry:
            await registry.register(record(), 0.2)

    asyncio.run(leave())
    config = redis_config(shared.url, "killed")
    assert registry_problems(config, (WorkerId("decode-0"),)) == []


async def test_the_config_says_which_registry_a_process_uses() -> None:
    async with (
        connect_registry(RegistryConfig(), "unix:/nowhere.sock") as embedded,
        connect_registry(redis_config("redis://127.0.0.1:1/0")) as redis,
    ):
        assert isinstance(embedded, RegistryClient)
        assert isinstance(redis, RedisRegistry)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"kind": "redis"}, "given a url"),
        ({"url": "redis://host:6379"}, "of kind redis"),
        ({"kind": "redis", "url": "http://host"}, "a URL such as"),
        ({"kind": "redis", "url": "redis://host:port"}, "a URL such as"),
        ({"kind": "redis", "url": "redis://host", "cluster": "a{b}"}, "pattern"),
    ],
)
def test_a_registry_section_that_contradicts_itself_is_refused(
    section: dict[str, str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ClusterConfig.model_validate({"model": {"path": "/nowhere"}, "registry": section})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("redis://user:p%40ss@host/1", "redis://***@host/1"),
        ("rediss://:pw@[::1]:6379/0?password=pw", "rediss://***@[::1]:6379/0"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    assert without_password(url) == shown
