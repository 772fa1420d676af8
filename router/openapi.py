"""The OpenAPI document: what may be asked, what is answered, and how an error looks.

The generating endpoints are raw ASGI. Here they are once more as FastAPI's routes, from the models
that parse their bodies and from models of their answers; these routes are never called.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, FastAPI, Header
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

from core.openai import ChatCompletionRequest, CompletionRequest
from core.sampling import FinishReason
from router.types import Timings

Count = Annotated[int, Field(ge=0)]


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's words; `param` names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer with a status of 400 and above, and a stream's error event."""

    error: ErrorDetail


class PromptTokensDetails(BaseModel):
    cached_tokens: Count


class Usage(BaseModel):
    """Tokens of all choices; a prompt is counted once."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokensDetails


class _Choice(BaseModel):
    index: Count
    logprobs: None
    finish_reason: FinishReason
    baton: Timings | None = None
    """Only where x-baton-timings is 1."""


class TextChoice(_Choice):
    text: str


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    message: AnswerMessage


class _Answer(BaseModel):
    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    usage: Usage
    baton: Timings | None = None
    """Of the only choice; only where x-baton-timings is 1."""


class TextAnswer(_Answer):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class ChatAnswer(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


ERRORS: dict[int | str, dict[str, Any]] = {  # FastAPI's type
    "4XX": {"model": ErrorBody, "description": "The request must change, or come later"},
    "5XX": {"model": ErrorBody, "description": "It could not be served"},
}
"""`responses` of every route. With it FastAPI does not promise a 422 of its own."""

_ERROR_CONTENT = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer in OpenAI's format; with `stream`, its chunks as events",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **ERRORS,
}

TimingsHeader = Annotated[
    Literal["1"] | None,
    Header(alias="x-baton-timings", description="What ends a choice has its times as `baton`"),
]
RequestIdHeader = Annotated[
    str | None,
    Header(alias="x-request-id", description="Echoed; the id in logs begins so", max_length=128),
]

GENERATING_BODY: dict[str, Any] = {
    "anyOf": [
        {"$ref": f"#/components/schemas/{request.__name__}"}
        for request in (ChatCompletionRequest, CompletionRequest)
    ]
}
"""The schema of a body of either endpoint."""


def body_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """`openapi_extra` of a route that reads its body itself, as the generating endpoints do."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_generating = APIRouter()


@_generating.post("/v1/chat/completions", response_model=ChatAnswer, responses=_STREAM)
async def chat_completions(
    body: ChatCompletionRequest,
    timings: TimingsHeader = None,
    request_id: RequestIdHeader = None,
) -> None:
    """Generate the next turn of a chat, streamed as server-sent events or whole."""


@_generating.post("/v1/completions", response_model=TextAnswer, responses=_STREAM)
async def completions(
    body: CompletionRequest,
    timings: TimingsHeader = None,
    request_id: RequestIdHeader = None,
) -> None:
    """Generate what follows a text, streamed as server-sent events or whole."""


def describe(app: FastAPI, model_names: Sequence[str]) -> None:
    """Let `app` answer with a document of all its routes, these two included."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title, version=app.version, routes=[*app.routes, *_generating.routes]
            )
            schemas = document["components"]["schemas"]
            for request in (ChatCompletionRequest, CompletionRequest):
                schemas[request.__name__]["properties"]["model"]["enum"] = list(model_names)
            for operations in document["paths"].values():
                for operation in operations.values():
                    for status in ERRORS:  # JSON, also where the answer is not
                        operation["responses"][status]["content"] = _ERROR_CONTENT
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
