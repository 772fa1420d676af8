"""POST /control/migrate: who may call it, what it takes and what it answers."""

import httpx
import pytest

from cluster.probe import view_of_router
from core.errors import InvalidRequest
from core.ids import RequestId, WorkerId
from router.types import MigrationReport, WorkerStatus
from tests.router.http_builders import ScriptedGenerator, in_loop, model_directory, running, saying

REPORT = MigrationReport(
    moved=True,
    reason="",
    source=WorkerId("d0"),
    destination=WorkerId("d1"),
    pause_s=0.02,
    total_s=0.3,
    tokens_meanwhile=9,
    transfer_bytes=4096,
    transfer_blocks=4,
    transfer_s=0.1,
)


class Moving(ScriptedGenerator):
    """Knows one running request."""

    async def migrate(
        self, request_id: RequestId, choice: int, to: WorkerId | None, timeout_s: float
    ) -> MigrationReport:
        if request_id != "req-1":
            raise InvalidRequest(f"no sequence {request_id}/{choice} runs", param="request_id")
        self.asked = (choice, to, timeout_s)
        return REPORT


def make_generator() -> Moving:
    return Moving(saying("a"))


@in_loop
async def test_the_report_comes_back_as_json(tmp_path):
    generator = make_generator()
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        url = f"{server.url}/control/migrate"
        body = {"request_id": "req-1", "choice": 2, "worker_id": "d1", "timeout_s": 3}
        answer = await http.post(url, json=body)
        asked = generator.asked
        await http.post(url, json={"request_id": "req-1"})
    assert answer.status_code == 200
    assert answer.json() == {
        "moved": True,
        "reason": "",
        "source": "d0",
        "destination": "d1",
        "pause_s": 0.02,
        "total_s": 0.3,
        "tokens_meanwhile": 9,
        "transfer_bytes": 4096,
        "transfer_blocks": 4,
        "transfer_s": 0.1,
    }
    assert asked == (2, "d1", 3.0)
    assert generator.asked == (0, None, 10.0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "request_id"),
        ({"request_id": "req-9"}, "request_id"),
        ({"request_id": "req-1", "choice": -1}, "choice"),
        ({"request_id": "req-1", "timeout_s": 0}, "timeout_s"),
        ({"request_id": "req-1", "to": "d1"}, "to"),
        ({"request_id": "x" * 1000}, "request_id"),
        ({"request_id": "req-1", "worker_id": "x" * 1000}, "worker_id"),
        ([], None),
    ],
)
@in_loop
async def test_what_is_wrong_is_named_as_everywhere_else(tmp_path, body, param):
    folder = model_directory(tmp_path)
    async with running(make_generator(), folder) as server, httpx.AsyncClient() as http:
        answer = await http.post(f"{server.url}/control/migrate", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    assert error["message"][0] not in ": "  # it once began with the name of a field that is none
    assert len(error["message"]) < 200


@in_loop
async def test_control_calls_need_a_key_where_keys_are_set(tmp_path):
    folder = model_directory(tmp_path)
    async with (
        running(make_generator(), folder, api_keys=("secret",)) as server,
        httpx.AsyncClient() as http,
    ):
        url, body = f"{server.url}/control/migrate", {"request_id": "req-1"}
        without = await http.post(url, json=body)
        with_key = await http.post(url, json=body, headers={"authorization": "Bearer secret"})
    assert (without.status_code, with_key.status_code) == (401, 200)


@in_loop
async def test_workers_are_listed_as_the_router_sees_them(tmp_path):
    slow = WorkerStatus(
        worker_id="p0",
        role="prefill",
        address="x",
        connected=True,
        ejected=True,
        ejected_for="slow",
    )
    fine = WorkerStatus(worker_id="p1", role="prefill", address="x", connected=True)
    other = WorkerStatus(
        worker_id="p2",
        role="prefill",
        address="x",
        connected=False,
        reason="it serves model a, not b",
    )
    generator = ScriptedGenerator(saying("a"), views=(slow, fine, other))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        listed = await http.get(f"{server.url}/control/workers")
        view = await view_of_router(server.url)
    assert [(w["worker_id"], w["ejected_for"]) for w in listed.json()] == [
        ("p0", "slow"),
        ("p1", ""),
        ("p2", ""),
    ]
    assert view.workers == tuple((name, "prefill", "x") for name in ("p0", "p1", "p2"))
    assert view.ejected == {"p0": "slow"}
    assert view.unreached == {"p2": "it serves model a, not b"}


async def test_a_router_that_is_gone_knows_and_has_left_out_nobody():
    assert await view_of_router("http://127.0.0.1:9") == ((), {}, {})
