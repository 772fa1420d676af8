"""A real router with real workers is asked what its own OpenAPI document allows, and what not.

Whatever comes, it answers within the request's time, never with a 5xx, as the document says; and
afterwards nothing is open. Examples are derived from the test's name: the same ones every time.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import anyio.to_thread
import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.router_faults.fleet import REQUEST_TIMEOUT_S, RunningFleet, running_fleet, settings_of

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

MODEL = Path(__file__).parents[2] / "demo_model" / "checkpoint"
GENERATING = ("/v1/chat/completions", "/v1/completions")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningFleet]:
    """One pair of workers that take no time for a short context, so that answers are many."""
    chosen = settings_of(MODEL)
    chosen["engine"]["timed"] = {
        "prefill_base_ms": 0.2,
        "decode_base_ms": 0.2,
        "context_tokens": 160,
    }
    chosen["router"]["debug_routes"] = True
    folder = tmp_path_factory.mktemp("fuzzed")
    async with running_fleet(folder, chosen, routers=1, workers=("p0", "d0")) as running:
        yield running


ROUNDS = 100


def few(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


async def test_answers_are_as_the_document_says(fleet: RunningFleet) -> None:
    seen = await anyio.to_thread.run_sync(ask_all, fleet.routers[0].url)
    for path in GENERATING:
        assert 400 in seen[f"POST {path}"]
    assert seen["POST /control/migrate"].keys() == {400}
    await fleet.clean()


def ask_all(url: str) -> dict[str, Counter[int]]:
    """Every operation, with what its schema allows and, where that can be had, with what it does
    not; answers how often which status came.
    """
    schema = schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())
    schema.config.update(base_url=url)
    seen: dict[str, Counter[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        statuses = seen.setdefault(operation.label, Counter())
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        examples = 30 if operation.path in GENERATING else 6
        for mode in modes:
            statuses.update(ask_one(operation, mode, examples))
    return seen


def ask_one(operation: APIOperation, mode: GenerationMode, examples: int) -> Counter[int]:
    """Each answer must be as the document says."""
    statuses: Counter[int] = Counter()

    @few(examples)
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        reply = case.call(timeout=REQUEST_TIMEOUT_S + 1)
        statuses[reply.status_code] += 1
        case.validate_response(reply, checks=CHECKS)

    ask()
    return statuses


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
SERVED = st.fixed_dictionaries(
    {
        "model": st.just(MODEL.name),
        "prompt": TEXT | st.lists(TEXT, min_size=1, max_size=3),
        "max_tokens": st.integers(1, 40),
    },
    optional={
        "stream": st.booleans(),
        "n": st.integers(1, 4),
        "stop": TEXT | st.lists(TEXT, max_size=4),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0, 1, exclude_min=True),
        "top_k": st.integers(-1, 2**31 - 1),
        "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=8),
        "ignore_eos": st.booleans(),
        "cache_salt": st.text(min_size=1, max_size=256),
    },
)


async def test_whatever_is_served_is_answered_in_full(fleet: RunningFleet) -> None:
    url = f"{fleet.routers[0].url}{GENERATING[1]}"

    @few(50)
    @given(body=SERVED)
    def ask(body: dict[str, object]) -> None:
        reply = httpx.post(url, json=body, timeout=REQUEST_TIMEOUT_S + 1)
        assert reply.status_code == 200, reply.text
        if body.get("stream"):
            assert reply.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in reply.text
        else:
            prompts = len(body["prompt"]) if isinstance(body["prompt"], list) else 1
            choices = reply.json()["choices"]
            assert len(choices) == prompts * int(str(body.get("n", 1)))
            assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}

    await anyio.to_thread.run_sync(ask)
    await fleet.clean()


@pytest.mark.parametrize("path", GENERATING)
async def test_any_bytes_for_a_body_are_refused(fleet: RunningFleet, path: str) -> None:
    @few(40)
    @given(body=st.binary(max_size=200) | st.recursive(LEAVES, nested, max_leaves=12).map(dumps))
    def ask(body: bytes) -> None:
        reply = httpx.post(f"{fleet.routers[0].url}{path}", content=body, timeout=5)
        assert reply.status_code == 400, reply.text
        assert reply.json()["error"]["message"]

    await anyio.to_thread.run_sync(ask)
    await fleet.clean()


async def test_what_was_asked_leaves_nothing_in_the_routers_memory(fleet: RunningFleet) -> None:
    """Two kilobytes kept of each request would be as much as is allowed for all of them."""
    (router,) = fleet.routers
    process = psutil.Process(router.process.pid)
    url = f"{router.url}{GENERATING[1]}"
    served = {"model": MODEL.name, "prompt": "A fox", "max_tokens": 3}
    bodies: list[tuple[int, object]] = [
        (200, served),
        (200, {**served, "stream": True, "n": 2}),
        (200, {**served, "stop": ["never said"], "seed": 1}),
        (400, {**served, "prompt": "a fox ran " * 400}),
        (400, {**served, "n": "many"}),
        (400, {**served, "unknown": [{"deep": [[]]}] * 50}),
        (400, "no object"),
        (404, {**served, "model": "another"}),
    ]

    async def ask_all(rounds: int) -> None:
        for _ in range(rounds):
            replies = await asyncio.gather(
                *(fleet.client.post(url, json=body) for _, body in bodies)
            )
            assert [reply.status_code for reply in replies] == [status for status, _ in bodies]

    await ask_all(ROUNDS // 2)
    before = process.memory_info().rss
    await ask_all(ROUNDS)
    grown = process.memory_info().rss - before
    assert grown < 2048 * ROUNDS * len(bodies), f"{grown} bytes"
    await fleet.clean()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def nested(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(inner) | st.dictionaries(st.sampled_from(["model", "prompt", "n"]), inner)


def dumps(value: object) -> bytes:
    return json.dumps(value).encode()
