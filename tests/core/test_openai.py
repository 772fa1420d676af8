"""Requests as OpenAI's own client types define them, and the refusal of what is not served."""

import json

import pytest
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from core.errors import InvalidRequest
from core.openai import (
    MAX_CHOICES,
    MAX_MESSAGES,
    MAX_METADATA,
    ChatCompletionRequest,
    CompletionRequest,
)

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
OURS = {"top_k", "stop_token_ids", "ignore_eos", "cache_salt"}
OURS_CHAT = OURS | {"chat_template_kwargs"}
OF_OTHERS: dict[str, tuple[object, object]] = {
    "repetition_penalty": (1.0, 1.1),
    "min_p": (0.0, 0.05),
    "min_tokens": (0, 5),
    "skip_special_tokens": (True, False),
    "spaces_between_special_tokens": (True, False),
    "include_stop_str_in_output": (False, True),
}
"""Of vLLM's and SGLang's API: a value that says nothing, and one that does."""
OF_OTHERS_CHAT: dict[str, tuple[object, object]] = {
    "add_generation_prompt": (True, False),
    "continue_final_message": (False, True),
}


def chat(**changes: object) -> ChatCompletionRequest:
    return ChatCompletionRequest.parse(json.dumps(CHAT | changes).encode())


def text(**changes: object) -> CompletionRequest:
    return CompletionRequest.parse(json.dumps(TEXT | changes).encode())


@pytest.mark.parametrize(
    ("request_type", "theirs", "more"),
    [
        (
            ChatCompletionRequest,
            chat_params.CompletionCreateParamsBase,
            OURS_CHAT | OF_OTHERS.keys() | OF_OTHERS_CHAT.keys(),
        ),
        (CompletionRequest, text_params.CompletionCreateParamsBase, OURS | OF_OTHERS.keys()),
    ],
)
def test_every_field_of_the_official_client_is_in_the_type(request_type, theirs, more):
    assert set(request_type.model_fields) == set(theirs.__annotations__) | {"stream"} | more


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("response_format", {"type": "json_object"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -0.5),
        ("modalities", ["audio"]),
        ("audio", {"voice": "alloy"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("moderation", {"model": "m"}),
        ("store", True),
        ("service_tier", "flex"),
        *((name, asked) for name, (_, asked) in (OF_OTHERS | OF_OTHERS_CHAT).items()),
    ],
)
def test_field_not_served_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=f"'{field}' is not served yet") as caught:
        chat(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("best_of", 2), ("echo", True), ("logprobs", 0), ("suffix", "x")),
        *((name, asked) for name, (_, asked) in OF_OTHERS.items()),
    ],
)
def test_completion_field_not_served_is_refused_by_name(field, value):
    with pytest.raises(InvalidRequest, match=f"'{field}' is not served yet") as caught:
        text(**{field: value})
    assert caught.value.param == field


def test_fields_that_say_nothing_are_accepted():
    request = chat(
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        logprobs=False,
        top_logprobs=0,
        logit_bias={},
        frequency_penalty=0,
        presence_penalty=0.0,
        modalities=["text"],
        store=False,
        service_tier="auto",
        user="u",
        metadata={"a": "b"},
        safety_identifier="s",
        prompt_cache_key="k",
        n=1,
    )
    assert request.messages[0].text == "hi"
    assert text(best_of=1, echo=False, suffix=None).prompt == ["hi"]


@pytest.mark.parametrize("n", [{}, {"n": None}, {"n": 1}, {"n": 3}])
def test_best_of_that_selects_nothing_is_accepted(n):
    same = n.get("n") or 1
    assert text(**n, best_of=same).n == n.get("n")
    for other in (0, same - 1, same + 1):
        with pytest.raises(InvalidRequest, match=f"set it to {same}$") as caught:
            text(**n, best_of=other)
        assert caught.value.param == "best_of"


def test_what_others_clients_send_unasked_is_accepted():
    """`vllm bench serve` sends a repetition penalty of 1 with every prompt."""
    neutral = {name: value for name, (value, _) in OF_OTHERS.items()}
    assert text(**neutral).prompt == ["hi"]
    neutral |= {name: value for name, (value, _) in OF_OTHERS_CHAT.items()}
    options = {"include_usage": True, "continuous_usage_stats": False}
    assert chat(**neutral, stream=True, stream_options=options).include_usage


@pytest.mark.parametrize("top_p", [0, 1])
def test_both_ends_of_top_p_are_accepted(top_p):
    assert chat(top_p=top_p).top_p == top_p


def test_padding_of_chunks_is_refused_by_name():
    with pytest.raises(InvalidRequest, match="is not served yet") as caught:
        chat(stream=True, stream_options={"include_obfuscation": True})
    assert caught.value.param == "stream_options.include_obfuscation"


def test_null_of_an_unknown_field_says_nothing_wherever_it_stands():
    turn = {"role": "assistant", "content": "x", "reasoning_content": None}
    part = {"type": "text", "text": "y", "annotations": None}
    request = chat(
        guided_json=None,
        messages=[turn, {"role": "user", "content": [part]}],
        stream=True,
        stream_options={"include_usage": True, "other": None},
    )
    assert [message.text for message in request.messages] == ["x", "y"]


def test_every_field_may_be_null_where_the_official_client_may_send_null():
    optional = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    assert chat(**dict.fromkeys(optional)).answer_tokens is None


@pytest.mark.parametrize(
    ("field", "near"),
    [
        ("temprature", "temperature"),
        ("max_token", "max_tokens"),
        ("stop_tokens_ids", "stop_token_ids"),
    ],
)
def test_unknown_field_is_refused_with_the_nearest_right_name(field, near):
    with pytest.raises(InvalidRequest, match=f"unknown field '{field}'; did you mean '{near}'"):
        chat(**{field: 1})


def test_unknown_field_like_no_other_has_no_hint():
    with pytest.raises(InvalidRequest) as caught:
        chat(zzz=1)
    assert caught.value.message == "unknown field 'zzz'"


def test_unknown_nested_field_is_refused_with_the_nearest_right_name():
    with pytest.raises(InvalidRequest, match="did you mean 'include_usage'"):
        chat(stream=True, stream_options={"include_usge": True})
    with pytest.raises(InvalidRequest, match=r"'messages\[0\].contents'; did you mean 'content'"):
        chat(messages=[{"role": "user", "content": "x", "contents": "y"}])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": None}, "model"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"repetition_penalty": True}, "repetition_penalty"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_k": -2}, "top_k"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"user": 5}, "user"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_wrong_value_names_its_field(changes, param):
    with pytest.raises(InvalidRequest) as caught:
        chat(**changes)
    assert caught.value.param == param
    assert param in caught.value.message
    assert "\n" not in caught.value.message


USER = {"role": "user", "content": "x"}
MANY = {f"field{i}": 1 for i in range(1000)}
NESTED = json.loads("[" * 900 + "]" * 900)


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"messages": [{}] * (MAX_MESSAGES + 1)}, "messages", f"at most {MAX_MESSAGES} messages"),
        (
            {"messages": [{"role": "user", "content": [{}] * MAX_MESSAGES}]},
            "messages",
            f"at most {MAX_MESSAGES} messages and parts",
        ),
        ({"metadata": dict.fromkeys(map(str, range(MAX_METADATA + 1)), "x")}, "metadata", "16"),
        (MANY, "field0", "unknown field"),
        ({"messages": [USER | MANY]}, "messages[0].field0", "unknown field"),
        ({"stream_options": MANY}, "stream_options.field0", "unknown field"),
        ({"stop": [1] * 1000}, "stop", "at most 4"),
        ({"chat_template_kwargs": {"x": "y" * 5000}}, "chat_template_kwargs", "4096 bytes"),
        ({"chat_template_kwargs": MANY}, "chat_template_kwargs", "4096 bytes"),
        ({"chat_template_kwargs": {"x": NESTED}}, "chat_template_kwargs", "too deeply"),
        ({"stop_token_ids": ["a"] * 1000}, "stop_token_ids[0]", "integer"),
        ({"stop_token_ids": [1] * 1000}, "stop_token_ids", "at most 256"),
    ],
)
def test_more_than_fits_is_refused_by_its_bound(changes, param, says):
    with pytest.raises(InvalidRequest, match=says) as caught:
        chat(**changes)
    assert caught.value.param == param


def test_as_much_as_fits_is_read():
    assert len(chat(messages=[USER] * MAX_MESSAGES).messages) == MAX_MESSAGES
    assert len(text(prompt=["a"] * MAX_CHOICES).prompt) == MAX_CHOICES
    metadata = dict.fromkeys(map(str, range(MAX_METADATA)), "x")
    assert chat(metadata=metadata).metadata == metadata


@pytest.mark.parametrize("prompt", ["a", []])
def test_more_prompts_than_choices_are_refused(prompt):
    with pytest.raises(InvalidRequest, match=f"at most {MAX_CHOICES} prompts, got 129") as caught:
        text(prompt=[prompt] * (MAX_CHOICES + 1))
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("field", ["messages", "stop_token_ids"])
def test_of_a_list_of_wrong_items_only_the_first_is_looked_at(field):
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(CHAT | {field: [{}] * 200})
    assert caught.value.error_count() <= len(("role", "content"))


@pytest.mark.parametrize("content", [{"content": None}, {}])
@pytest.mark.parametrize("calls", ["tool_calls", "function_call"])
def test_turn_that_calls_a_tool_in_place_of_content_is_refused_for_the_call(content, calls):
    turn = {"role": "assistant", calls: [{"id": "1"}], **content}
    with pytest.raises(InvalidRequest, match="is not served yet") as caught:
        chat(messages=[USER, turn])
    assert caught.value.param == f"messages[1].{calls}"


def test_image_part_is_refused_as_such():
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "u"}}]
    with pytest.raises(InvalidRequest, match='part of type "image_url"; only text is served'):
        chat(messages=[{"role": "user", "content": parts}])


@pytest.mark.parametrize("kind", [None, 5, True, ["text"], {"type": "text"}])
def test_part_whose_type_is_no_string_is_refused(kind):
    part = {"type": kind, "text": "x"}
    with pytest.raises(InvalidRequest, match="must hold parts like"):
        chat(messages=[{"role": "user", "content": [part]}])


def test_part_of_text_with_more_in_it_is_refused_for_that():
    part = {"type": "text", "text": "x", "language": "en"}
    with pytest.raises(InvalidRequest, match='a part with "language", which is not served'):
        chat(messages=[{"role": "user", "content": [part]}])


@pytest.mark.parametrize("hint", ["prompt_cache_breakpoint", "cache_control"])
def test_part_may_hint_where_to_cache(hint):
    part = {"type": "text", "text": "x", hint: {"type": "ephemeral"}}
    assert chat(messages=[{"role": "user", "content": [part]}]).messages[0].text == "x"


def test_the_schema_allows_nulls_of_unknown_fields_and_hints():
    schema = ChatCompletionRequest.model_json_schema()
    message = schema["$defs"]["ChatMessage"]
    part = message["properties"]["content"]["anyOf"][1]["items"]
    for described in (schema, message, part, CompletionRequest.model_json_schema()):
        assert described["additionalProperties"] == {"type": "null"}
    assert {"prompt_cache_breakpoint", "cache_control"} < part["properties"].keys()


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].text == "x\ny"


def test_answer_may_be_sent_back_as_it_came():
    answer = {
        "role": "assistant",
        "content": "hello",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    }
    assert chat(messages=[answer, CHAT["messages"][0]]).messages[0].text == "hello"


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompt_in_all_four_forms(prompt, read):
    assert text(prompt=prompt).prompt == read


@pytest.mark.parametrize("prompt", [None, 5, [], ["a", 1], [1.5], [True], [["a"]], {"a": 1}])
def test_prompt_of_another_form_is_refused(prompt):
    with pytest.raises(InvalidRequest) as caught:
        text(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("given", [None, {}, {"enable_thinking": False, "any": [{"x": None}]}])
def test_template_variables_are_any_json_object(given):
    assert chat(chat_template_kwargs=given).chat_template_kwargs == (given or {})


@pytest.mark.parametrize("stop", [None, [], "a", ["a"]])
def test_stop_in_all_forms(stop):
    assert chat(stop=stop).stop == ([] if not stop else ["a"])


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"null", b'"x"', b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b"\xff"],
)
def test_what_is_no_json_object_is_refused(raw):
    with pytest.raises(InvalidRequest):
        ChatCompletionRequest.parse(raw)
    with pytest.raises(InvalidRequest):
        ChatCompletionRequest.parse(b"[" * 5000)


DEEP = b"[" * 1000 + b"]" * 1000
READ = sorted(set(ChatCompletionRequest.model_fields) - {"messages", "prompt_cache_options"})


@pytest.mark.parametrize("field", READ)
def test_deeply_nested_value_is_refused_like_any_other(field):
    raw = b'{"messages": [{"role": "user", "content": "a"}], "%b": %b}' % (field.encode(), DEEP)
    with pytest.raises(InvalidRequest) as caught:
        ChatCompletionRequest.parse(raw if field == "model" else raw[:-1] + b', "model": "m"}')
    assert caught.value.param.removesuffix("[0]") == field
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": "x" * 10_000},
        {"temperature": ["x" * 10_000]},
        {"x" * 10_000: 1},
        {"metadata": {"x" * 10_000: 1}},
        {"messages": [{"role": "x" * 10_000, "content": "a"}]},
        {"messages": [USER | {"x" * 10_000: 1}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 10_000}]}]},
        {"stream_options": {"x" * 10_000: 1, "y": 1, "z": 1}},
    ],
)
def test_what_a_client_made_up_is_shortened_in_messages(changes):
    with pytest.raises(InvalidRequest) as caught:
        chat(**changes)
    assert len(caught.value.message) < 350
    assert len(caught.value.param) < 150
