"""Bodies: bounded each and together, in time as well, and unread without a key."""

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncIterator

import httpx
import pytest

from core.errors import InvalidRequest, Overloaded
from router.config import RouterConfig
from router.http_body import FREE_BYTES, INLINE_BYTES, Intake, parsed
from router.http_errors import ClientGone
from tests.router.http_builders import (
    MODEL,
    ScriptedGenerator,
    in_loop,
    model_directory,
    raw_connection,
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


MB = 1024 * 1024
GENERATING = ["/v1/completions", "/v1/chat/completions"]


class Upload:
    """A body that comes piece by piece, and is held until `done`."""

    def __init__(self, intake: Intake) -> None:
        self.pieces: asyncio.Queue[dict[str, object]] = asyncio.Queue()
        self.done = asyncio.Event()
        self.task = asyncio.create_task(self._read(intake))

    async def send(self, num_bytes: int, *, more: bool = True) -> None:
        self.pieces.put_nowait(
            {"type": "http.request", "body": bytes(num_bytes), "more_body": more}
        )
        await asyncio.sleep(0.01)

    async def _read(self, intake: Intake) -> int:
        async with intake.body({"headers": []}, self.pieces.get) as body:
            await self.done.wait()
            return len(body)


@pytest.fixture
def intake() -> Intake:
    return Intake(RouterConfig(max_bodies_mb=2))


@in_loop
async def test_bodies_that_are_too_much_together_are_refused(intake):
    first, second = Upload(intake), Upload(intake)
    await first.send(MB)
    await second.send(MB)
    await second.send(MB)
    with pytest.raises(Overloaded, match="too many large bodies"):
        await second.task
    await first.send(MB, more=False)
    first.done.set()
    assert await first.task == 2 * MB


@in_loop
async def test_a_small_body_finds_room_beside_large_ones(intake):
    large, small = Upload(intake), Upload(intake)
    await large.send(2 * MB)
    await small.send(FREE_BYTES, more=False)
    small.done.set()
    assert await small.task == FREE_BYTES
    large.task.cancel()


@in_loop
async def test_a_body_alone_is_read_whatever_the_bound(intake):
    alone = Upload(intake)
    await alone.send(3 * MB)
    await alone.send(3 * MB, more=False)
    alone.done.set()
    assert await alone.task == 6 * MB


@in_loop
async def test_room_comes_back_when_a_body_is_done_with_or_given_up(intake):
    for give_up in (True, False, True):
        upload = Upload(intake)
        await upload.send(2 * MB, more=give_up)
        if give_up:
            upload.task.cancel()
        upload.done.set()
        await asyncio.wait([upload.task])
    last, beside = Upload(intake), Upload(intake)
    await beside.send(MB)
    await last.send(MB, more=False)
    last.done.set()
    assert await last.task == MB
    beside.task.cancel()


@in_loop
async def test_a_body_is_let_go_of_though_an_error_is_held(intake):
    upload = Upload(intake)
    await upload.send(MB)
    upload.pieces.put_nowait({"type": "http.disconnect"})
    with pytest.raises(ClientGone) as gone:
        await upload.task
    trace, bodies = gone.tb, []
    while trace is not None:
        bodies += [v for v in trace.tb_frame.f_locals.values() if isinstance(v, bytearray)]
        trace = trace.tb_next
    assert bodies
    assert not any(bodies)


@in_loop
async def test_only_large_bodies_are_parsed_off_the_event_loop():
    def thread(body: bytearray) -> int:
        return threading.get_ident()

    assert await parsed(thread, bytearray(INLINE_BYTES)) == threading.get_ident()
    assert await parsed(thread, bytearray(INLINE_BYTES + 1)) != threading.get_ident()


@in_loop
async def test_what_parsing_refuses_off_the_event_loop_is_raised():
    def refuse(body: bytearray) -> None:
        raise InvalidRequest("no")

    with pytest.raises(InvalidRequest, match="no"):
        await parsed(refuse, bytearray(INLINE_BYTES + 1))


@pytest.mark.parametrize("path", [*PATHS, *GENERATING])
@in_loop
async def test_a_body_that_does_not_come_is_given_up_and_the_connection_closed(tmp_path, path):
    folder, generator = model_directory(tmp_path), ScriptedGenerator(saying("a"))
    async with running(generator, folder, explainer=Explaining(), upload_timeout_s=0.05) as server:
        connection, loop = await raw_connection(server.port), asyncio.get_running_loop()
        with connection:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{{"
            await loop.sock_sendall(connection, head.encode())
            answer = b""
            while piece := await loop.sock_recv(connection, 65536):
                answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"the body did not come within 0.05 s"' in answer


@pytest.mark.parametrize("path", [*PATHS, *GENERATING])
@in_loop
async def test_a_compressed_body_is_refused_as_such(tmp_path, path):
    folder, generator = model_directory(tmp_path), ScriptedGenerator(saying("a"))
    async with (
        running(generator, folder, explainer=Explaining()) as server,
        httpx.AsyncClient() as http,
    ):
        answer = await http.post(
            f"{server.url}{path}", content=gzip.compress(BIG), headers={"content-encoding": "gzip"}
        )
    assert answer.status_code == 400
    assert "Content-Encoding 'gzip' is not read" in answer.json()["error"]["message"]
