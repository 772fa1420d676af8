"""The mock worker of peers, as a process: what a gateway reads from it."""

import asyncio
import json
import socket
import sys
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.router.client import Client, chat_body
from benchmarks.servers import Server, server

pytestmark = pytest.mark.processes


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port: int = some.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def mocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, int, int]]:
    """The process, its prefill port and its decode port."""
    prefill, decode = free_port(), free_port()
    module = "benchmarks.router.peers.engine"
    command = [sys.executable, "-m", module, "sglang", "tiny", str(prefill), str(decode)]
    with server("mocks", command, tmp_path_factory.mktemp("mocks")) as process:
        assert process.first_line() == "ready\n"
        yield process, prefill, decode


async def test_a_decode_worker_streams_as_many_tokens_as_it_was_asked_for(
    mocks: tuple[Server, int, int],
) -> None:
    client = await Client.connect(mocks[2])
    async with asyncio.timeout(10):
        assert (await client.ask(chat_body("tiny", "Hello", 5))).events == 5
        assert (await client.ask(chat_body("tiny", "Again", 3))).events == 3, "the same connection"
    client.close()


async def test_a_prefill_worker_answers_one_token(mocks: tuple[Server, int, int]) -> None:
    client = await Client.connect(mocks[1])
    async with asyncio.timeout(10):
        assert (await client.ask(chat_body("tiny", "Hello", 5))).events == 1
    client.close()


async def test_every_step_sends_one_event_of_each_answer_by_itself(
    mocks: tuple[Server, int, int],
) -> None:
    process, _, decode = mocks
    process.tell("step 0.01")
    clients = [await Client.connect(decode) for _ in range(3)]
    async with asyncio.timeout(10):
        seen = await asyncio.gather(*(c.ask(chat_body("tiny", "Hello", 6)) for c in clients))
    process.tell("step 0")
    assert [one.events for one in seen] == [6, 6, 6]
    assert all(one.reads >= 6 for one in seen)
    for client in clients:
        client.close()


def test_bodies_in_chunks_and_the_newer_name_of_the_limit_are_understood(
    mocks: tuple[Server, int, int],
) -> None:
    body = json.dumps({"stream": True, "max_completion_tokens": 4}).encode()

    def pieces() -> Iterator[bytes]:
        yield body[:7]
        yield body[7:]

    url = f"http://127.0.0.1:{mocks[2]}/v1/chat/completions"
    answer = httpx.post(url, content=pieces(), timeout=10)
    assert answer.text.count("data: ") == 5, "four tokens and [DONE]"
    assert '"finish_reason":"length"' in answer.text


def test_what_gateways_ask_before_requests_is_answered(mocks: tuple[Server, int, int]) -> None:
    base = f"http://127.0.0.1:{mocks[1]}"
    assert httpx.get(f"{base}/health", timeout=10).status_code == 200
    assert httpx.get(f"{base}/v1/models", timeout=10).json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{base}/get_model_info", timeout=10).json()["is_generation"] is True
