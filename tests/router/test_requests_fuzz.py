"""Whatever JSON object a client sends is planned, or refused with a 4xx that names the field.

Bodies go through the real parsing, template, tokenizer and planner. One draw in two is as OpenAI's
API allows, the others have a field or two that hold anything. Examples are the same every time.
"""

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.clock import FakeClock
from core.errors import BatonError, UserError
from core.ids import RequestId
from core.openai import MAX_CHOICES, ChatCompletionRequest, CompletionRequest, OpenAiRequest
from router.requests import Plan, Planner
from router.tokenizer import Tokenizer
from tests.router.http_builders import (
    MODEL,
    ScriptedGenerator,
    model_directory,
    saying,
    served_model,
)

CONTEXT_TOKENS = 200
Body = dict[str, object]
Fields = dict[str, st.SearchStrategy[object]]


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    tokenizer = Tokenizer.load(model_directory(tmp_path_factory.mktemp("model")), 1)
    yield Planner(
        generator=ScriptedGenerator(saying("a"), context_tokens=CONTEXT_TOKENS),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        model=served_model(),
        model_names=[MODEL],
        clock=FakeClock(),
    )
    tokenizer.close()


# -- bodies -------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
HUGE = st.sampled_from([2**63, 2**64, -(2**64), 10**30])
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | HUGE | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
TOKEN = st.integers(-1, 450)
LONG_NAME = "x" * 5000


def nested(depth: int) -> list[object]:
    value: list[object] = []
    for _ in range(depth):
        value = [value]
    return value


TOO_MUCH = st.sampled_from(
    [
        *([item] * 300 for item in ({}, [], "", 1)),
        {f"key{i}": 1 for i in range(300)},
        {LONG_NAME: LONG_NAME},
        LONG_NAME[:1000],
        [{f"key{i}": 1 for i in range(300)}],
        nested(900),
    ]
)

SHARED: Fields = {
    "stream": st.booleans() | st.none(),
    "stream_options": st.fixed_dictionaries(
        {},
        optional={
            "include_usage": st.booleans(),
            "continuous_usage_stats": st.booleans(),
            "include_obfuscation": st.booleans(),
        },
    )
    | st.none(),
    "max_tokens": st.integers(1, 2 * CONTEXT_TOKENS) | st.none(),
    "n": st.integers(1, MAX_CHOICES) | st.none(),
    "temperature": st.floats(0, 2) | st.integers(0, 2) | st.none(),
    "top_p": st.floats(0, 1, exclude_min=True) | st.just(0) | st.none(),
    "seed": st.integers(-(2**63), 2**63 - 1) | st.none(),
    "stop": TEXT.filter(bool) | st.lists(TEXT.filter(bool), max_size=4) | st.just("") | st.none(),
    "user": TEXT | st.none(),
    "top_k": st.integers(-1, 2**31 - 1),
    "stop_token_ids": st.lists(st.integers(0, 2**31 - 1), max_size=4),
    "ignore_eos": st.booleans(),
    "cache_salt": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
}
NOT_SERVED: Fields = {
    "frequency_penalty": st.floats(-2, 2) | st.just(0) | st.none(),
    "presence_penalty": st.floats(-2, 2) | st.just(0) | st.none(),
    "logit_bias": st.dictionaries(st.integers(0, 400).map(str), st.integers(-100, 100), max_size=2)
    | st.none(),
}
PARTS = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
    | st.fixed_dictionaries({"type": st.just("image_url"), "image_url": ANYTHING}),
    max_size=3,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": TEXT}, optional={"name": TEXT}
)
ODD_MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"]),
        "content": TEXT | PARTS,
    },
    optional={"refusal": st.none() | TEXT, "tool_calls": st.none() | st.just([{}])},
)


def some_of(
    required: Fields, optional: Fields, seldom: Fields, at_most: int = 4
) -> st.SearchStrategy[Body]:
    """A body with a few of the optional fields, and now and then one that is not served."""
    names = st.lists(st.sampled_from(sorted(optional)), max_size=at_most, unique=True)
    rare = st.just("") | st.just("") | st.sampled_from(sorted(seldom))

    def chosen(drawn: tuple[list[str], str]) -> st.SearchStrategy[Body]:
        more, rarely = drawn
        fields = required | {name: optional[name] for name in more}
        return st.fixed_dictionaries(fields | ({rarely: seldom[rarely]} if rarely else {}))

    return st.tuples(names, rare).flatmap(chosen)


CHAT = some_of(
    {"model": st.just(MODEL), "messages": st.lists(MESSAGE, min_size=1, max_size=3)},
    SHARED | {"max_completion_tokens": st.integers(1, 2 * CONTEXT_TOKENS) | st.none()},
    NOT_SERVED
    | {
        "messages": st.lists(ODD_MESSAGE, max_size=3),
        "tools": st.just([]) | st.just([{"type": "function", "function": {"name": "f"}}]),
        "tool_choice": st.sampled_from(["none", "auto", "required"]),
        "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
        "logprobs": st.booleans(),
        "top_logprobs": st.integers(0, 20),
        "modalities": st.sampled_from([["text"], ["audio"]]),
        "metadata": st.dictionaries(TEXT, TEXT, max_size=2),
        "service_tier": st.sampled_from(["auto", "default", "flex"]),
        "store": st.booleans(),
        "chat_template_kwargs": st.dictionaries(
            TEXT | st.sampled_from(["messages", "eos_token", "range", "documents"]),
            ANYTHING,
            max_size=2,
        ),
    },
)
COMPLETION = some_of(
    {
        "model": st.just(MODEL),
        "prompt": TEXT
        | st.lists(TEXT, max_size=3)
        | st.lists(TOKEN, max_size=CONTEXT_TOKENS + 5)
        | st.lists(st.lists(TOKEN, max_size=5), max_size=3),
    },
    SHARED,
    NOT_SERVED
    | {
        "best_of": st.integers(1, 3),
        "echo": st.booleans(),
        "logprobs": st.integers(0, 5) | st.none(),
        "suffix": TEXT | st.none(),
    },
)


def spoilt(bodies: st.SearchStrategy[Body], kind: type[OpenAiRequest]) -> st.SearchStrategy[Body]:
    """With something else in a field or two, known or not, and perhaps one left out."""
    names = st.sampled_from(sorted(kind.model_fields)) | st.text("abc_", min_size=1, max_size=8)
    changes = st.dictionaries(
        names | st.just(LONG_NAME), ANYTHING | TOO_MUCH, min_size=1, max_size=2
    )
    leaves_out = st.none() | st.sampled_from(["model", "messages", "prompt"])
    return st.tuples(bodies, changes, leaves_out).map(
        lambda drawn: {k: v for k, v in (drawn[0] | drawn[1]).items() if k != drawn[2]}
    )


# -- what becomes of them -----------------------------------------------------------------------


def outcome(planner: Planner, kind: type[OpenAiRequest], body: Body) -> Plan | BatonError:
    async def plan() -> Plan:
        request = kind.parse(json.dumps(body).encode())
        return await planner.plan(request, RequestId("r"), 10.0)

    coroutine = plan()
    try:
        coroutine.send(None)  # short texts are tokenized at once: nothing is waited for
    except StopIteration as done:
        plan_made: Plan = done.value
        return plan_made
    except BatonError as error:
        return error
    coroutine.close()
    raise AssertionError("it waits for something")


def judge(planner: Planner, kind: type[OpenAiRequest], body: Body) -> str:
    """Fails where the outcome is none of the two; else says which."""
    made = outcome(planner, kind, body)
    if isinstance(made, Plan):
        assert 1 <= len(made.choices) <= MAX_CHOICES
        for choice in made.choices:
            request = choice.request
            assert request.prompt_tokens
            answer_tokens = request.sampling.max_tokens
            assert 1 <= answer_tokens <= CONTEXT_TOKENS - len(request.prompt_tokens)
            assert 0 <= request.sampling.seed < 2**63
        return "planned"
    assert isinstance(made, UserError), made
    assert 400 <= made.http_status < 500
    assert made.param is not None, made.message
    assert len(made.message) < 500, made.message
    field = re.split(r"[.\[]", made.param)[0]
    assert (
        field in body or LONG_NAME.startswith(field) or made.message == f"'{field}' is required"
    ), (made.param, made.message)
    return "refused"


PROMPTS: dict[type[OpenAiRequest], Body] = {
    ChatCompletionRequest: {"messages": [{"role": "user", "content": "hi"}]},
    CompletionRequest: {"prompt": "hi"},
}
LIMITS = {ChatCompletionRequest: "max_completion_tokens", CompletionRequest: "max_tokens"}
FUZZ = settings(
    database=None,
    derandomize=True,
    deadline=None,
    max_examples=250,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(
    ("kind", "bodies"),
    [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)],
    ids=["chat", "completion"],
)
def test_every_body_is_planned_or_refused_by_the_name_of_a_field(
    planner: Planner, kind: type[OpenAiRequest], bodies: st.SearchStrategy[Body]
) -> None:
    seen = {"planned": 0, "refused": 0}

    @FUZZ
    @example(body={"model": MODEL, **PROMPTS[kind], LIMITS[kind]: 2 * CONTEXT_TOKENS})
    @given(body=bodies | spoilt(bodies, kind))
    def send(body: Body) -> None:
        seen[judge(planner, kind, body)] += 1

    send()
    # How many of each is left to hypothesis, which draws by the modules that are loaded too.
    assert all(seen.values()), f"both kinds are tried: {seen}"
