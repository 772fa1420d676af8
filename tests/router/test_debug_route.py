"""POST /debug/route: off by default, and explains a placement without running the request."""

import json

import httpx
import pytest

from core.ids import Role, WorkerId
from router.local import LocalVerdict
from router.types import GenerateRequest, RouteCandidate, RouteChoice
from tests.builders import make_prompt, make_request, running_cluster
from tests.router.http_builders import (
    MODEL,
    ScriptedGenerator,
    in_loop,
    model_directory,
    running,
    saying,
)

CHOICE = RouteChoice(
    leg=Role.PREFILL,
    worker_id=WorkerId("p0"),
    rule="cost",
    candidates=(RouteCandidate(worker_id=WorkerId("p0"), cost=0.5, terms={"work_s": 0.5}),),
    line="p0 by cost: p0=0.5(work_s=0.5)",
    local=LocalVerdict.SLOWER,
)


class Explaining:
    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []

    def explain_route(self, request: GenerateRequest) -> tuple[RouteChoice, ...]:
        self.asked.append(request)
        return (CHOICE,)


@pytest.mark.parametrize(
    "body",
    [
        {"model": MODEL, "prompt": "a fox ran", "max_tokens": 5},
        {"model": MODEL, "messages": [{"role": "user", "content": "a fox"}], "max_tokens": 5},
    ],
    ids=["completion", "chat"],
)
@in_loop
async def test_a_body_of_either_endpoint_is_explained_and_not_run(tmp_path, body):
    generator, explainer = ScriptedGenerator(saying("a")), Explaining()
    folder = model_directory(tmp_path)
    async with (
        running(generator, folder, explainer=explainer) as server,
        httpx.AsyncClient() as http,
    ):
        answer = await http.post(f"{server.url}/debug/route", json=body)
    assert answer.status_code == 200
    assert answer.json() == [
        {
            "leg": "prefill",
            "worker_id": "p0",
            "rule": "cost",
            "candidates": [{"worker_id": "p0", "cost": 0.5, "terms": {"work_s": 0.5}}],
            "line": "p0 by cost: p0=0.5(work_s=0.5)",
            "local": "slower",
        }
    ]
    (asked,) = explainer.asked
    assert asked.sampling.max_tokens == 5
    assert asked.prompt_tokens
    assert not generator.requests


CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a fox"}]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        *(
            json.dumps(body).encode()
            for body in (
                {"model": MODEL},
                CHAT | {"messages": []},
                CHAT | {"temperature": 9},
                CHAT | {"foo": 1},
                CHAT | {"tools": [{"type": "function"}]},
                CHAT | {"max_tokens": 1, "max_completion_tokens": 2},
                CHAT | {"messages": [{"role": "tool", "content": "a"}]},
                {"model": MODEL, "prompt": "a", "n": 0},
                {"model": MODEL, "prompt": ["a"] * 200},
            )
        ),
        b'{"model": "tiny", "prompt": "a", "n": %b}' % (b"[" * 1000 + b"]" * 1000),
    ],
)
@in_loop
async def test_what_an_endpoint_refuses_is_not_explained_but_refused_alike(tmp_path, body):
    generator, explainer = ScriptedGenerator(saying("a")), Explaining()
    folder = model_directory(tmp_path)
    path = "/v1/completions" if b"prompt" in body else "/v1/chat/completions"
    async with (
        running(generator, folder, explainer=explainer) as server,
        httpx.AsyncClient() as http,
    ):
        real, debug = [
            await http.post(f"{server.url}{one}", content=body) for one in (path, "/debug/route")
        ]
    assert (debug.status_code, debug.json()) == (real.status_code, real.json())
    assert real.status_code == 400
    assert not explainer.asked


@in_loop
async def test_there_is_no_such_route_without_an_explainer(tmp_path):
    generator, folder = ScriptedGenerator(saying("a")), model_directory(tmp_path)
    async with running(generator, folder) as server, httpx.AsyncClient() as http:
        answer = await http.post(f"{server.url}/debug/route", json={"model": MODEL, "prompt": "a"})
    assert answer.status_code == 404


async def test_the_real_flow_explains_both_legs_and_submits_nothing() -> None:
    async with running_cluster() as cluster:
        choices = cluster.flow.explain_route(make_request(make_prompt(22)))
        assert [choice.leg for choice in choices] == [Role.PREFILL, Role.DECODE]
        for choice in choices:
            assert choice.worker_id in {c.worker_id for c in choice.candidates}
            assert choice.line.startswith(choice.worker_id)
        assert all(worker.load().running == 0 for worker in cluster.workers)
        assert all(not link.view.unseen_submits for link in cluster.fleet.links() if link.view)
