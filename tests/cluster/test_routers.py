"""Two router processes over the workers of one Redis, which dies and comes back empty."""

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.redis_registry import RedisRegistry
from cluster.router_main import main
from tests.cluster.test_router_main import MODEL, bare_directory
from tests.processes import worker_processes, write_config
from tests.redis_server import RedisServer, redis_server

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

START_S = 60.0
CLUSTER = "routers"


def config_file(folder: Path, server: RedisServer) -> Path:
    return write_config(
        folder,
        {
            "model": {"path": str(bare_directory(folder))},
            "engine": {"kind": "timed", "kv_memory_mb": 4},
            "registry": {"kind": "redis", "url": server.url, "cluster": CLUSTER},
            "drain_timeout_s": 1.0,
        },
    )


@contextmanager
def router_process(config: Path) -> Iterator[str]:
    """Gives its URL at once; it is ready later."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cluster.router_main"),
            *("--config", str(config), "--port", str(port)),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)


async def until_ready(client: httpx.AsyncClient, url: str) -> None:
    async with asyncio.timeout(START_S):
        while True:
            try:
                if (await client.get(f"{url}/ready")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # it does not listen yet
            await asyncio.sleep(0.05)


async def answer(client: httpx.AsyncClient, url: str) -> str:
    body = {"model": MODEL, "prompt": "word1 word2", "max_tokens": 8, "seed": 1}
    reply = await client.post(f"{url}/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


async def until_registered(server: RedisServer, number: int) -> None:
    async with asyncio.timeout(20), RedisRegistry(server.url, CLUSTER) as registry:
        while len(await registry.workers()) != number:
            await asyncio.sleep(0.05)


async def test_routers_answer_without_redis_and_a_new_one_finds_workers_after_it(
    tmp_path: Path,
) -> None:
    async with httpx.AsyncClient(timeout=30, trust_env=False) as client:
        await answered(client, tmp_path)


async def answered(client: httpx.AsyncClient, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(redis_server())
        config = config_file(tmp_path, server)
        urls = [stack.enter_context(router_process(config)) for _ in range(2)]
        stack.enter_context(worker_processes(config, ["prefill", "decode"]))
        for url in urls:
            await until_ready(client, url)
        text = await answer(client, urls[0])
        assert await answer(client, urls[1]) == text

        server.kill()
        late = stack.enter_context(router_process(config))
        for _ in range(3):
            assert [await answer(client, url) for url in urls] == [text, text]

        server.start()
        await until_registered(server, 2)
        await until_ready(client, late)
        assert [await answer(client, url) for url in (*urls, late)] == [text] * 3


def test_a_router_by_hand_without_a_registry_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path, {"model": {"path": "/nowhere"}})
    assert main(["--config", str(config)]) == 1
    assert "set registry.kind to redis" in caplog.text
