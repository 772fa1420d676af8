"""The bytes of an answer in OpenAI's formats: SSE chunks, or one JSON body.

Of a chunk only the text changes from token to token, so what stands around it is encoded once per
choice:   data: {"id":...,"choices":[{"index":0,   "delta":{"content":  TEXT  },...}]}\n\n
"""

from collections.abc import Sequence
from dataclasses import dataclass

import orjson

from core.errors import BatonError
from core.sampling import FinishReason
from router.answer import Answer
from router.http_errors import error_body
from router.types import Timings

DONE = b"data: [DONE]\n\n"
_NO_USAGE = b',"usage":null'
"""In no text: JSON escapes its quotes."""

JsonObject = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """What every chunk of one answer repeats."""

    answer_id: str
    created_s: int
    model: str
    fingerprint: str
    chat: bool
    usage_chunk: bool
    """A usage chunk will follow, so the others carry `usage: null`."""
    running_usage: bool
    """They carry the usage of their choice so far instead."""
    timings: bool
    """Add the `baton` object to what ends a choice."""

    def json(self, kind: str, choices: list[JsonObject]) -> JsonObject:
        return {
            "id": self.answer_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


class ChunkEncoder:
    """SSE events of one choice."""

    __slots__ = ("_after", "_before", "_chat", "_close", "_open", "_timings")

    def __init__(self, head: AnswerHead, index: int) -> None:
        self._chat = head.chat
        self._timings = head.timings
        body = orjson.dumps(head.json(_chunk_kind(head), []))
        self._open = b'data: %b{"index":%d,' % (body.removesuffix(b"]}"), index)
        self._close = b"}]" + (_NO_USAGE if head.usage_chunk or head.running_usage else b"")
        self._before = self._open + (b'"delta":{"content":' if head.chat else b'"text":')
        self._after = (b"}" if head.chat else b"") + self._end(None) + b"}\n\n"

    def first(self) -> bytes:
        """Opens a chat answer by its role; empty for a text completion."""
        if not self._chat:
            return b""
        return self._open + b'"delta":{"role":"assistant","content":""' + self._after

    def text(self, piece: str) -> bytes:
        return self._before + orjson.dumps(piece) + self._after

    def finish(self, reason: FinishReason, timings: Timings) -> bytes:
        content = b'"delta":{}' if self._chat else b'"text":""'
        baton = b',"baton":' + orjson.dumps(timings) if self._timings else b""
        return b"%b%b%b%b}\n\n" % (self._open, content, self._end(reason), baton)

    def _end(self, reason: FinishReason | None) -> bytes:
        """Of the choice, and what stands behind all of them."""
        return b',"logprobs":null,"finish_reason":%b%b' % (orjson.dumps(reason), self._close)


class _CountingEncoder(ChunkEncoder):
    """With the usage so far in each event."""

    __slots__ = ("_answer",)

    def __init__(self, head: AnswerHead, answer: Answer) -> None:
        super().__init__(head, answer.index)
        self._answer = answer

    def first(self) -> bytes:
        return self._counted(super().first())

    def text(self, piece: str) -> bytes:
        return self._counted(super().text(piece))

    def finish(self, reason: FinishReason, timings: Timings) -> bytes:
        return self._counted(super().finish(reason, timings))

    def _counted(self, event: bytes) -> bytes:
        usage = orjson.dumps(_usage([self._answer], counted=[self._answer]))
        return event.replace(_NO_USAGE, b',"usage":' + usage)


def chunk_encoder(head: AnswerHead, answer: Answer) -> ChunkEncoder:
    if head.running_usage:
        return _CountingEncoder(head, answer)
    return ChunkEncoder(head, answer.index)


def usage_event(head: AnswerHead, answers: Sequence[Answer]) -> bytes:
    """The chunk that `stream_options.include_usage` asks for."""
    body = head.json(_chunk_kind(head), []) | {"usage": _usage(answers, _one_a_prompt(answers))}
    return sse_event(orjson.dumps(body))


def error_event(error: BatonError) -> bytes:
    """Ends a stream that cannot be completed."""
    return sse_event(error_body(error))


def sse_event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def answer_body(head: AnswerHead, answers: Sequence[Answer], texts: Sequence[str]) -> bytes:
    """The whole answer; `texts` are the answers' texts."""
    choices = [_choice(head, a, text) for a, text in zip(answers, texts, strict=True)]
    body = head.json("chat.completion" if head.chat else "text_completion", choices)
    body["usage"] = _usage(answers, _one_a_prompt(answers))
    if head.timings and len(answers) == 1:
        body["baton"] = answers[0].timings
    return orjson.dumps(body)


def _choice(head: AnswerHead, answer: Answer, text: str) -> JsonObject:
    choice: JsonObject = {"index": answer.index, "logprobs": None, "finish_reason": answer.finish}
    if head.chat:
        choice["message"] = {"role": "assistant", "content": text, "refusal": None}
    else:
        choice["text"] = text
    if head.timings:
        choice["baton"] = answer.timings
    return choice


def _one_a_prompt(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.planned.counts_prompt]


def _usage(answers: Sequence[Answer], counted: Sequence[Answer]) -> JsonObject:
    """`counted` are those whose prompts count."""
    prompt_tokens = sum(len(answer.planned.request.prompt_tokens) for answer in counted)
    output_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(a.cached_tokens for a in counted)},
    }


def _chunk_kind(head: AnswerHead) -> str:
    return "chat.completion.chunk" if head.chat else "text_completion"
