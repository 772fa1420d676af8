"""Bodies of the small endpoints: bounded, and unread without a key."""

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.router.http_builders import (
    MODEL,
    ScriptedGenerator,
    in_loop,
    model_directory,
    running,
    saying,
)
from tests.router.test_debug_route import Explaining

LIMIT_BYTES = 4096
BIG = json.dumps({"model": MODEL, "prompt": "x" * LIMIT_BYTES, "max_tokens": 5}).encode()
PATHS = ["/debug/route", "/control/migrate"]


async def in_chunks() -> AsyncIterator[bytes]:
    for start in range(0, len(BIG), 1000):
        yield BIG[start : start + 1000]


@pytest.mark.parametrize("path", PATHS)
@in_loop
async def test_a_large_body_is_refused_with_or_without_its_length(tmp_path, path):
    explainer = Explaining()
    folder, generator = model_directory(tmp_path), ScriptedGenerator(saying("a"))
    async with (
        running(generator, folder, explainer=explainer, max_body_bytes=LIMIT_BYTES) as server,
        httpx.AsyncClient() as http,
    ):
        url = f"{server.url}{path}"
        answers = [await http.post(url, content=BIG), await http.post(url, content=in_chunks())]
        health = await http.get(f"{server.url}/health")
    assert [answer.status_code for answer in answers] == [413, 413]
    assert all(answer.json()["error"]["code"] == "request_too_large" for answer in answers)
    assert all(answer.headers["x-request-id"] for answer in answers)
    assert not explainer.asked
    assert health.status_code == 200


@pytest.mark.parametrize("path", PATHS)
@in_loop
async def test_without_a_key_nothing_is_explained_moved_or_read(tmp_path, path):
    explainer = Explaining()
    folder, generator = model_directory(tmp_path), ScriptedGenerator(saying("a"))
    async with (
        running(
            generator, folder, explainer=explainer, api_keys=("k",), max_body_bytes=9
        ) as server,
        httpx.AsyncClient() as http,
    ):
        answer = await http.post(f"{server.url}{path}", content=BIG)
    assert answer.status_code == 401
    assert not explainer.asked


@in_loop
async def test_a_key_opens_the_debug_route(tmp_path):
    folder, generator = model_directory(tmp_path), ScriptedGenerator(saying("a"))
    async with (
        running(generator, folder, explainer=Explaining(), api_keys=("k",)) as server,
        httpx.AsyncClient(headers={"authorization": "Bearer k"}) as http,
    ):
        body = {"model": MODEL, "prompt": "a fox", "max_tokens": 5}
        answer = await http.post(f"{server.url}/debug/route", json=body)
    assert answer.status_code == 200
