"""The registry through a real gRPC server; tests/core/test_registry.py has what all promise."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from cluster.registry_client import RegistryClient
from cluster.registry_server import serve_registry
from core.clock import SystemClock
from core.errors import Unavailable
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.registry import MemoryRegistry, WorkerRecord

LOOPBACK = "127.0.0.1:0"
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


def memory_registry() -> MemoryRegistry:
    return MemoryRegistry(SystemClock(), sweep_s=0.02)


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(bounded())


async def next_of(watch: AsyncGenerator[Records, None]) -> Records:
    return await asyncio.wait_for(anext(watch), 5)


def test_a_registry_on_a_socket_of_the_file_system_serves_as_well() -> None:
    async def test() -> None:
        with TemporaryDirectory() as folder:
            address = f"unix:{folder}/registry.sock"
            async with (
                serve_registry(memory_registry(), address),
                RegistryClient(address) as client,
            ):
                await client.register(record(), ttl_s=5)
                assert await client.workers() == (record(),)

    run(test())


def test_a_watch_survives_a_registry_that_restarts_empty() -> None:
    async def test() -> None:
        async with serve_registry(memory_registry(), LOOPBACK) as address:
            client = RegistryClient(address)
            watch = client.watch()
            await client.register(record("decode-0"), ttl_s=5)
            while await next_of(watch) != (record("decode-0"),):
                pass
        async with serve_registry(memory_registry(), address):
            assert await next_of(watch) == ()
            await client.register(record("decode-1"), ttl_s=5)
            assert await next_of(watch) == (record("decode-1"),)
            await watch.aclose()
        await client.aclose()

    run(test())


def test_a_client_registers_again_after_the_registry_was_away() -> None:
    async def test() -> None:
        async with serve_registry(memory_registry(), LOOPBACK) as address:
            client = RegistryClient(address, call_timeout_s=5)
            await client.register(record(), ttl_s=5)
        async with serve_registry(memory_registry(), address):
            assert await client.workers() == ()
            await client.register(record(), ttl_s=5)
            assert await client.workers() == (record(),)
        await client.aclose()

    run(test())


def test_a_registry_that_is_away_is_unavailable_in_bounded_time() -> None:
    async def test() -> None:
        async with serve_registry(memory_registry(), LOOPBACK) as address:
            pass
        async with RegistryClient(address, call_timeout_s=0.5) as client:
            with pytest.raises(Unavailable, match="does not answer"):
                await client.workers()

    run(test())


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("nan"), 1e9])
def test_a_ttl_out_of_bounds_is_refused(ttl_s: float) -> None:
    async def test() -> None:
        async with (
            serve_registry(memory_registry(), LOOPBACK) as address,
            RegistryClient(address) as client,
        ):
            with pytest.raises(Unavailable, match="ttl_s must be in"):
                await client.register(record(), ttl_s)

    run(test())
