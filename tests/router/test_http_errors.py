"""What goes wrong reaches the client as an HTTP error in OpenAI's shape, or as an error event."""

import asyncio
import json
import logging

import httpx
import openai
import pytest
from http_builders import (
    MODEL,
    ScriptedGenerator,
    endless,
    failing,
    in_loop,
    model_directory,
    running,
    saying,
)

from core.errors import (
    BatonError,
    DeadlineExceeded,
    InternalError,
    NoWorkers,
    Overloaded,
    WorkerLost,
)
from router.types import WorkerStatus

CHAT = [{"role": "user", "content": "hello"}]
GOOD = {"model": MODEL, "messages": CHAT}
LONG = [{"role": "user", "content": "fox " * 2000}]


def bad_chat(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        (b'{"model": ', 400, None, "not valid JSON"),
        (b"", 400, None, "empty"),
        (b"[1]", 400, None, "JSON object"),
        (b"\xff\xfe", 400, None, "not valid JSON"),
        (bad_chat(model="other"), 404, "model", "'other' does not exist; this server has 'tiny'"),
        (bad_chat(messages=[]), 400, "messages", "at least one"),
        (bad_chat(messages=LONG), 400, "messages", "this model's maximum context length is 1000"),
        (bad_chat(messages=LONG), 400, "messages", "prompt is too long"),
        (bad_chat(max_tokens=1000), 400, "max_tokens", "this model's maximum context length is"),
        (bad_chat(max_tokens=1000), 400, "max_tokens", "the answer may have 1000"),
        (bad_chat(max_tokens=0), 400, "max_tokens", "greater than or equal to 1, got 0"),
        (bad_chat(max_tokens=-1), 400, "max_tokens", "greater than or equal to 1, got -1"),
        (bad_chat(temperature=float("nan")), 400, None, "not valid JSON"),
        (bad_chat(temperature="NaN"), 400, "temperature", 'valid number, got "NaN"'),
        (bad_chat(temperature=2.1), 400, "temperature", "less than or equal to 2"),
        (bad_chat(top_p=-0.1), 400, "top_p", "greater than or equal to 0"),
        (bad_chat(messages="hello"), 400, "messages", "valid list"),
        (bad_chat(messages=[{"role": "user"}]), 400, "messages[0].content", "required"),
        (bad_chat(stream="yes"), 400, "stream", "valid boolean"),
        (bad_chat(n=[[[]]]), 400, "n", "valid integer, got a list"),
        (bad_chat(n=129), 400, "n", "less than or equal to 128"),
        (bad_chat(tools=[{"type": "function"}]), 400, "tools", "not served yet"),
        (bad_chat(temprature=1), 400, "temprature", "did you mean 'temperature'?"),
    ],
)
@in_loop
async def test_bad_request_is_a_clear_4xx(tmp_path, body, status, param, says):
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        answer = await http.post(f"{server.url}/v1/chat/completions", content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]
    assert generator.requests == []


@in_loop
async def test_body_of_20_mb_is_refused_and_the_connection_lives_on(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    big = bad_chat(messages=[{"role": "user", "content": "x" * 20_000_000}])

    async def chunked():
        for start in range(0, len(big), 1_000_000):
            yield big[start : start + 1_000_000]

    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        url = f"{server.url}/v1/chat/completions"
        answers = [await http.post(url, content=big), await http.post(url, content=chunked())]
        after = await http.post(url, json=GOOD)
    assert [answer.status_code for answer in answers] == [413, 413]
    assert all(answer.json()["error"]["code"] == "request_too_large" for answer in answers)
    assert after.status_code == 200


@pytest.mark.parametrize(
    ("prompt", "param"), [([], "prompt"), ([[]], "prompt"), ([1, 10_000], "prompt"), ("", "prompt")]
)
@in_loop
async def test_bad_prompt_is_refused(tmp_path, prompt, param):
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.param == param


@in_loop
async def test_chat_template_that_refuses_is_a_400(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    late_system = [*CHAT, {"role": "system", "content": "be brief"}]
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="system first"):
            await client.chat.completions.create(model=MODEL, messages=late_system)


@pytest.mark.parametrize(
    ("variables", "param"),
    [
        ({"parts": 0}, "messages"),
        ({"add_generation_prompt": False}, "chat_template_kwargs.add_generation_prompt"),
        ("enable_thinking", "chat_template_kwargs"),
    ],
)
@in_loop
async def test_bad_chat_template_kwargs_are_a_400(tmp_path, variables, param):
    generator = ScriptedGenerator(saying("a"))
    folder = model_directory(tmp_path, chat_template="{{ 100 // parts }}")
    async with running(generator, folder) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="chat_template_kwargs") as caught:
            await client.chat.completions.create(
                model=MODEL, messages=CHAT, extra_body={"chat_template_kwargs": variables}
            )
    assert caught.value.param == param


@in_loop
async def test_chat_without_a_template_is_a_400_and_completions_work(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    folder = model_directory(tmp_path, chat_template=None)
    async with running(generator, folder) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            await client.chat.completions.create(model=MODEL, messages=CHAT)
        answer = await client.completions.create(model=MODEL, prompt="hello")
    assert answer.choices[0].text == "a"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (Overloaded("busy", retry_after_s=2.5), openai.RateLimitError, 429),
        (NoWorkers("no decode worker"), openai.InternalServerError, 503),
        (WorkerLost("gone"), openai.InternalServerError, 503),
        (DeadlineExceeded("too late"), openai.InternalServerError, 504),
        (InternalError("a bug"), openai.InternalServerError, 500),
    ],
)
@in_loop
async def test_error_before_the_first_token_has_its_status(tmp_path, stream, error, kind, status):
    generator = ScriptedGenerator(failing(error))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model=MODEL, messages=CHAT, stream=stream)
    assert caught.value.status_code == status
    assert caught.value.code == error.code
    assert caught.value.body["message"] == error.message
    retry_after = {Overloaded: "3", NoWorkers: "5"}.get(type(error))
    assert caught.value.response.headers.get("retry-after") == retry_after


@in_loop
async def test_error_in_mid_stream_is_an_event_after_the_text_so_far(tmp_path):
    generator = ScriptedGenerator(failing(WorkerLost("both workers died"), after="a fox"))
    text = ""
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
        with pytest.raises(openai.APIError, match="both workers died") as caught:
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
    assert text == "a fox"
    assert caught.value.code == "worker_lost"


@in_loop
async def test_failure_of_one_choice_ends_the_other(tmp_path):
    async def uneven(request):
        script = endless() if request.choice else failing(WorkerLost("gone"), after="a")
        async for item in script(request):
            yield item

    generator = ScriptedGenerator(uneven)
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model=MODEL, messages=CHAT, n=2)
        await generator.until_running(0)


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_bug_is_logged_with_its_id_and_answered_500(tmp_path, stream, caplog):
    generator = ScriptedGenerator(failing(ZeroDivisionError("oops")))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=CHAT, stream=stream, extra_headers={"x-request-id": "mine"}
            )
    assert "mine." in caught.value.body["message"]
    assert "oops" not in caught.value.body["message"]
    assert caught.value.request_id == "mine"
    [record] = [r for r in caplog.records if r.exc_info]
    assert record.getMessage().startswith("request_failed request_id=mine.")
    assert record.exc_info[0] is ZeroDivisionError


@in_loop
async def test_generator_without_a_finish_is_a_bug_not_a_hang(tmp_path):
    async def stops_short(request):
        async for item in saying("a fox")(request):
            if item.finish is None:
                yield item

    generator = ScriptedGenerator(stops_short)
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError, match="without a finish"):
            await client.chat.completions.create(model=MODEL, messages=CHAT)


@pytest.mark.parametrize("first", [0, 3])
@in_loop
async def test_request_ends_at_its_deadline(tmp_path, first):
    generator = ScriptedGenerator(endless(first=first))
    folder = model_directory(tmp_path)
    async with (
        running(generator, folder, request_timeout_s=0.3) as server,
        server.client() as client,
    ):
        with pytest.raises(openai.APIError) as caught:
            stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)
            [chunk async for chunk in stream]
        await generator.until_running(0)
    assert caught.value.code == "deadline_exceeded"


@in_loop
async def test_the_generator_is_first_to_end_what_runs_too_long(tmp_path):
    async def waits_in_vain(request):
        await asyncio.sleep(request.deadline_s)
        raise DeadlineExceeded("worker p0 said nothing")
        yield  # an async generator

    generator = ScriptedGenerator(waits_in_vain)
    folder = model_directory(tmp_path)
    async with (
        running(generator, folder, request_timeout_s=0.2) as server,
        httpx.AsyncClient() as http,
    ):
        answer = await http.post(f"{server.url}/v1/chat/completions", json=GOOD)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        504,
        "worker p0 said nothing",
    )


@in_loop
async def test_unknown_paths_and_methods_have_openais_shape(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        missing = await http.get(f"{server.url}/v1/nothing")
        wrong = await http.get(f"{server.url}/v1/chat/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert missing.headers["x-request-id"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("HEAD", "/v1/completions", "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/control/migrate", "POST"),
    ],
)
@in_loop
async def test_other_methods_are_told_which_are_allowed(tmp_path, method, path, allowed):
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        answer = await http.request(method, f"{server.url}{path}")
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models"])
@in_loop
async def test_head_is_answered_like_get_without_the_body(tmp_path, path):
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        head, get = await http.head(f"{server.url}{path}"), await http.get(f"{server.url}{path}")
        after = await http.get(f"{server.url}/health")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    assert after.json() == {"status": "alive"}


@in_loop
async def test_long_names_are_cut_in_answers(tmp_path):
    generator, long = ScriptedGenerator(saying("a")), "x" * 5000
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        answers = [
            await http.get(f"{server.url}/{long}"),
            await http.get(f"{server.url}/v1/models/{long}"),
            await http.post(f"{server.url}/v1/chat/completions", content=bad_chat(model=long)),
        ]
    assert [answer.status_code for answer in answers] == [404, 404, 404]
    assert all("xxx..." in answer.json()["error"]["message"] for answer in answers)
    assert all(len(answer.content) < 400 for answer in answers)


@in_loop
async def test_only_a_known_key_is_let_in_and_probes_stay_open(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    folder = model_directory(tmp_path)
    async with running(generator, folder, api_keys=("k1", "k2")) as server:
        async with server.client("wrong") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.chat.completions.create(model=MODEL, messages=CHAT)
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with server.client("k2") as client:
            await client.chat.completions.create(model=MODEL, messages=CHAT)
        async with httpx.AsyncClient() as http:
            probes = [await http.get(f"{server.url}/{p}") for p in ("health", "ready", "metrics")]
    assert caught.value.code == "invalid_api_key"
    assert [probe.status_code for probe in probes] == [200, 200, 200]


@in_loop
async def test_model_endpoints(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        listed = await client.models.list()
        one = await client.models.retrieve(MODEL)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
    assert [card.id for card in listed.data] == [MODEL]
    assert one.model_extra["max_model_len"] == 1000
    assert caught.value.code == "model_not_found"


@in_loop
async def test_ready_says_what_is_missing_while_health_is_fine(tmp_path):
    views = (WorkerStatus(worker_id="p0", role="prefill", address="x", connected=True),)
    generator = ScriptedGenerator(saying("a"), ready=False, context_tokens=0, views=views)
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        ready = await http.get(f"{server.url}/ready")
        health = await http.get(f"{server.url}/health")
        chat = await http.post(f"{server.url}/v1/chat/completions", json=GOOD)
    assert (ready.status_code, health.status_code) == (503, 200)
    assert ready.json()["reason"] == "no decode worker is connected"
    assert (chat.status_code, chat.json()["error"]["code"]) == (503, "no_workers")


@in_loop
async def test_request_id_is_echoed_and_unusable_ones_are_replaced(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="router.http_edge")
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        url, echoed = f"{server.url}/v1/chat/completions", []
        for offered in ("abc-1", "abc-1", "x" * 129, "two words", "a\tb"):
            headers = {"x-request-id": offered}
            answer = await http.post(url, json=GOOD, headers=headers)
            echoed.append(answer.headers["x-request-id"])
    used = [request.request_id for request in generator.requests]
    assert echoed[:2] == ["abc-1", "abc-1"]
    assert all(one.startswith("abc-1.") for one in used[:2]) and used[0] != used[1]
    assert echoed[2:] == used[2:]
    lines = [record.getMessage() for record in caplog.records]
    assert f"request_done request_id={used[0]} endpoint=/v1/chat/completions status=200" in lines[0]


@in_loop
async def test_only_the_lines_of_refused_requests_may_be_left_out(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="router.http_edge")
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        url = f"{server.url}/v1/chat/completions"
        await http.post(url, json=GOOD)
        await http.post(url, json={**GOOD, "model": "other"})
    served, refused = caplog.records
    assert " status=200 " in served.getMessage() and hasattr(served, "keep_line")
    assert " status=404 " in refused.getMessage() and not hasattr(refused, "keep_line")


@in_loop
async def test_metrics_count_requests_tokens_and_errors(tmp_path):
    generator = ScriptedGenerator(saying("a fox", cached_tokens=4))
    async with running(generator, model_directory(tmp_path)) as server, server.client() as client:
        await client.chat.completions.create(model=MODEL, messages=CHAT)
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=CHAT)
        path = "/v1/chat/completions"
        async with httpx.AsyncClient() as http:
            page = (await http.get(f"{server.url}/metrics")).text
        assert server.sample("baton_http_requests_total", endpoint=path, status="200") == 1
        assert server.sample("baton_http_requests_total", endpoint=path, status="404") == 1
        assert server.sample("baton_ttft_seconds_count", endpoint=path) == 1
        assert server.sample("baton_tpot_seconds_count", endpoint=path) == 1
        assert server.sample("baton_cached_tokens_total") == 4
        assert server.sample("baton_requests_in_flight") == 0
    assert "baton_output_tokens_total 3.0" in page


@in_loop
async def test_openapi_document_describes_the_generating_endpoints(tmp_path):
    generator = ScriptedGenerator(saying("a"))
    async with running(generator, model_directory(tmp_path)) as server, httpx.AsyncClient() as http:
        document = (await http.get(f"{server.url}/openapi.json")).json()
    schemas = document["components"]["schemas"]
    for path, name in (
        ("/v1/chat/completions", "ChatCompletionRequest"),
        ("/v1/completions", "CompletionRequest"),
    ):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert body["schema"]["$ref"] == f"#/components/schemas/{name}"
        assert "model" in schemas[name]["required"]
        assert schemas[name]["properties"]["model"]["enum"] == [MODEL]
    assert "ChatMessage" in schemas
    for operations in document["paths"].values():
        for operation in operations.values():
            error = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert error == {"$ref": "#/components/schemas/ErrorBody"}
            assert "422" not in operation["responses"]


def test_every_error_of_the_tree_has_a_status_a_client_can_act_on():
    def below(cls):
        return [cls, *(c for child in cls.__subclasses__() for c in below(child))]

    assert all(400 <= cls.http_status < 600 for cls in below(BatonError))
