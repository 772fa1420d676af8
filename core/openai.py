"""What a client may ask: OpenAI's chat and text completion requests, as typed models.

Every field of OpenAI's API is in the type. A field this server cannot honour is refused by name
unless its value means "not used": an ignored field would be an answer to another question.

    raw bytes -> JSON -> types and ranges -> fields not served -> fields that contradict
"""

import json
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    SkipValidation,
    WithJsonSchema,
)

from core.errors import InvalidRequest
from core.json_body import Object, check_names, read_object, shown, validated

MAX_STOP_STRINGS = 4
MAX_CHOICES = 128
MAX_MESSAGES = 10_000
"""Of one request; each part of a message counts as one more. Far more than a context holds turns,
and reading so many takes the router some tens of milliseconds.
"""
MAX_METADATA = 16
MAX_TEMPLATE_KWARGS_BYTES = 4096
"""As JSON. A template may write them into every turn."""
_INT64_MAX = 2**63 - 1
_INT32_MAX = 2**31 - 1
_NOT_USED: tuple[JsonValue, ...] = (None, [], {})
_OF_A_PART = frozenset(("type", "text", "prompt_cache_breakpoint", "cache_control"))
"""The last two, OpenAI's and Anthropic's, are hints where to cache; every prefix is cached here."""
_SERVED_OF_MESSAGE = frozenset(("role", "content", "name"))
_NOT_SERVED_OF_MESSAGE = (
    *("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id"),
)


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra={"additionalProperties": {"type": "null"}},
    )


class TextPart(_Body):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


def _check_content(value: object) -> str | list[TextPart]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            raise ValueError(f"has a part of type {shown(kind)}; only text is served")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError('must hold parts like {"type": "text", "text": "..."}')
        if not part.keys() <= _OF_A_PART:
            for name in part:
                if name not in _OF_A_PART and part[name] is not None:
                    raise ValueError(f"has a part with {shown(name)}, which is not served")
    return [TextPart(type="text", text=part["text"]) for part in value]


def _check_stop(value: object) -> list[str]:
    stops = [value] if isinstance(value, str) else ([] if value is None else value)
    if isinstance(stops, list) and len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"may hold at most {MAX_STOP_STRINGS} strings, got {len(stops)}")
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("must be a string or a list of strings")
    if "" in stops:
        raise ValueError("must not hold an empty string")
    return stops


def _check_prompt(value: object) -> list[str] | list[list[int]]:
    """Any of the four forms OpenAI allows, as a list of texts or a list of token id lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if isinstance(value[0], str | list) and len(value) > MAX_CHOICES:
            raise ValueError(f"may hold at most {MAX_CHOICES} prompts, got {len(value)}")
        if all(isinstance(item, str) for item in value):
            return value
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, list) and all(type(t) is int for t in item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, token ids, or lists of token ids")


def _check_template_kwargs(value: object) -> Object:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"must be an object, got {shown(value)}")
    try:
        size = len(orjson.dumps(value))
    except orjson.JSONEncodeError:  # all else that orjson read it also writes
        raise ValueError("is nested too deeply") from None
    if size > MAX_TEMPLATE_KWARGS_BYTES:
        raise ValueError(f"may hold at most {MAX_TEMPLATE_KWARGS_BYTES} bytes of JSON, got {size}")
    return value


def _any_of(*schemas: dict[str, JsonValue]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": list(schemas)})


_STRING: dict[str, JsonValue] = {"type": "string"}
_TOKENS: dict[str, JsonValue] = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_TEXT_PART: dict[str, JsonValue] = {
    "type": "object",
    "properties": {name: {} for name in sorted(_OF_A_PART)}
    | {"type": {"const": "text"}, "text": _STRING},
    "required": ["type", "text"],
    "additionalProperties": {"type": "null"},
}

Content = Annotated[
    str | list[TextPart],
    PlainValidator(_check_content),
    _any_of(_STRING, {"type": "array", "items": _TEXT_PART}),
]
Stop = Annotated[
    list[str],
    PlainValidator(_check_stop),
    _any_of(_STRING, {"type": "array", "items": _STRING, "maxItems": 4}, {"type": "null"}),
]
Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(_check_prompt),
    _any_of(
        _STRING,
        {"type": "array", "items": _STRING, "minItems": 1},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1},
    ),
]
TemplateKwargs = Annotated[
    Object, PlainValidator(_check_template_kwargs), _any_of({"type": "object"}, {"type": "null"})
]


Unserved = Annotated[JsonValue, SkipValidation]
"""Of a field that is refused unless its value says nothing: what is in it does not matter."""


class ChatMessage(_Body):
    """One turn of a chat. An answer of this server may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content
    name: str | None = None
    refusal: Unserved = None
    annotations: Unserved = None
    audio: Unserved = None
    function_call: Unserved = None
    tool_calls: Unserved = None
    tool_call_id: Unserved = None

    @property
    def text(self) -> str:
        """The content as one text; parts are joined by a newline."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class StreamOptions(_Body):
    include_usage: bool | None = None
    """Send one more chunk before the end with the usage of the whole request."""
    include_obfuscation: bool | None = None
    """Padding of chunks against traffic analysis. Not served; false is accepted."""
    continuous_usage_stats: bool | None = None
    """Beyond OpenAI's API: every chunk has the usage of its choice so far."""


class OpenAiRequest(_Body):
    """What both endpoints share. Use `parse` of a subclass."""

    not_served: ClassVar[Mapping[str, tuple[JsonValue, ...]]] = {
        "frequency_penalty": (None, 0),
        "presence_penalty": (None, 0),
        "logit_bias": _NOT_USED,
        "repetition_penalty": (None, 1),
        "min_p": (None, 0),
        "min_tokens": (None, 0),
        "skip_special_tokens": (None, True),
        "spaces_between_special_tokens": (None, True),
        "include_stop_str_in_output": (None, False),
    }
    """Field -> the values that mean it is not used."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of the answer at most; unset means all that the context leaves."""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy. Unset takes the checkpoint's own default."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """0 leaves the likeliest token alone."""
    seed: Annotated[int, Field(ge=-_INT64_MAX - 1, le=_INT64_MAX)] | None = None
    stop: Stop = Field(default_factory=list)
    """Up to four strings; the answer ends before the first that appears."""
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Unserved = None
    user: str | None = None

    top_k: Annotated[int, Field(ge=-1, le=_INT32_MAX)] | None = None
    """Beyond OpenAI's API: draw among the k likeliest tokens; 0 or -1 means no limit."""
    stop_token_ids: list[Annotated[int, Field(ge=0, le=_INT32_MAX)]] | None = Field(
        None, max_length=256, fail_fast=True
    )
    """Beyond OpenAI's API: token ids that end the answer, besides the model's own."""
    ignore_eos: bool | None = None
    """Beyond OpenAI's API: the model's own end-of-answer tokens do not end it."""
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Beyond OpenAI's API: only requests with the same salt share cached prefixes."""

    # Of vLLM's and SGLang's API and not served here; their clients and benchmarks send the neutral
    # values unasked.
    repetition_penalty: float | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    @classmethod
    def parse(cls, raw: bytes | bytearray) -> Self:
        """Read a request body. Raises InvalidRequest that names the field at fault."""
        return cls.of(read_object(raw))

    @classmethod
    def of(cls, body: Object) -> Self:
        """As `parse`, of a body that was read."""
        _check_names_and_sizes(body)
        request = validated(cls, body)
        request.check()
        return request

    def check(self) -> None:
        """Refuse what the types allow and this server does not. Raises InvalidRequest."""
        asked = self.not_served.keys() & self.model_fields_set
        if asked:  # seldom: the first in the order of our own list is named
            for name, neutral in self.not_served.items():
                if name in asked and getattr(self, name) not in neutral:
                    raise _refusal(name, neutral)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed with 'stream': true", param="stream_options"
            )
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise _refusal("stream_options.include_obfuscation", (None, False))

    @property
    def answer_tokens(self) -> int | None:
        """The client's limit on the answer, if it set one."""
        return self.max_tokens

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def running_usage(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.continuous_usage_stats)


class ChatCompletionRequest(OpenAiRequest):
    """POST /v1/chat/completions"""

    not_served = {
        **OpenAiRequest.not_served,
        "tools": _NOT_USED,
        "tool_choice": (None, "none", "auto"),
        "functions": _NOT_USED,
        "function_call": (None, "none", "auto"),
        "response_format": (None, {"type": "text"}),
        "logprobs": (None, False),
        "top_logprobs": (None, 0),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "reasoning_effort": (None, "none"),
        "verbosity": (None, "medium"),
        "web_search_options": (None,),
        "moderation": (None,),
        "store": (None, False),
        "service_tier": (None, "auto", "default"),
        "add_generation_prompt": (None, True),
        "continue_final_message": (None, False),
    }

    messages: list[ChatMessage] = Field(fail_fast=True)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """The newer name of max_tokens."""
    tools: Unserved = None
    tool_choice: Unserved = None
    parallel_tool_calls: bool | None = None
    functions: Unserved = None
    function_call: Unserved = None
    response_format: Unserved = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    modalities: Unserved = None
    audio: Unserved = None
    prediction: Unserved = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Unserved = None
    moderation: Unserved = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Unserved = None
    prompt_cache_retention: str | None = None

    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)
    """Beyond OpenAI's API: variables of the model's chat template, such as Qwen3's
    `enable_thinking`. One it does not use changes nothing; what the server itself passes, such as
    `messages`, is refused.
    """

    # Of vLLM's and SGLang's API, as above.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise InvalidRequest("'messages' must hold at least one message", param="messages")
        for i, message in enumerate(self.messages):
            _check_message(message, f"messages[{i}]")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) == 2:
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' differ; set one", param="max_tokens"
            )

    @property
    def answer_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(OpenAiRequest):
    """POST /v1/completions"""

    not_served = {
        **OpenAiRequest.not_served,
        "echo": (None, False),
        "logprobs": (None,),
        "suffix": (None, ""),
    }

    prompt: Prompt
    """Text, several texts, token ids, or several lists of them; each is answered on its own."""
    best_of: int | None = None
    """Not served; the value of `n`, which selects nothing, is accepted."""
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    def check(self) -> None:
        super().check()
        per_prompt = self.n or 1
        if self.best_of not in (None, per_prompt):
            raise _refusal("best_of", (None, per_prompt))


def _check_names_and_sizes(body: Object) -> None:
    """Refuse what would take long to validate, and unknown fields of what lies within."""
    options, metadata = body.get("stream_options"), body.get("metadata")
    if isinstance(options, dict):
        check_names(StreamOptions, options, "stream_options.")
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA:
        raise InvalidRequest(
            f"'metadata' may hold at most {MAX_METADATA} entries, got {len(metadata)}",
            param="metadata",
        )
    messages = body.get("messages")
    if not isinstance(messages, list):
        return
    if (num_parts := len(messages)) <= MAX_MESSAGES:
        for i, message in enumerate(messages):
            if isinstance(message, dict):
                check_names(ChatMessage, message, f"messages[{i}].")
                content = message.get("content")
                if isinstance(content, list):
                    num_parts += len(content)
                elif content is None:
                    _check_calls(message, f"messages[{i}]")
    if num_parts > MAX_MESSAGES:
        raise InvalidRequest(
            f"'messages' may hold at most {MAX_MESSAGES} messages and parts, got {num_parts}",
            param="messages",
        )


def _check_message(message: ChatMessage, where: str) -> None:
    if message.role in ("tool", "function"):
        raise InvalidRequest(
            f"'{where}.role': messages of role '{message.role}' are not served yet",
            param=f"{where}.role",
        )
    if message.model_fields_set <= _SERVED_OF_MESSAGE:
        return
    for name in _NOT_SERVED_OF_MESSAGE:
        if getattr(message, name) not in _NOT_USED:
            raise _refusal(f"{where}.{name}", _NOT_USED)


def _check_calls(message: Object, where: str) -> None:
    """A turn that calls tools has no content: what is not served is the calls."""
    for name in _NOT_SERVED_OF_MESSAGE:
        if message.get(name) not in _NOT_USED:
            raise _refusal(f"{where}.{name}", _NOT_USED)


def _refusal(name: str, neutral: tuple[JsonValue, ...]) -> InvalidRequest:
    allowed = [json.dumps(value) for value in neutral if value not in _NOT_USED and value != ""]
    instead = f" or set it to {' or '.join(allowed)}" if allowed else ""
    return InvalidRequest(f"'{name}' is not served yet; leave it out{instead}", param=name)
