"""The demo's requests, sent with the official client, and what came back."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import openai
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from pydantic import BaseModel, ConfigDict, ValidationError

from core.errors import InternalError

SYSTEM = "You are a helpful assistant that explains Python."
CHAT = ("What does the with statement do?", "Go on.", "Go on.")
SINGLE = ("How do exceptions work?", "What is a metaclass?")
MAX_TOKENS = 160
_TIMEOUT_S = 300.0

OnText = Callable[[str], None]


class StageTimes(BaseModel):
    """The `baton` object that ends a choice when `x-baton-timings: 1` asks for it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prefill_worker: str
    decode_worker: str
    queue_s: float
    prefill_s: float
    ttft_s: float
    transfer_s: float
    transfer_bytes: int
    transfer_blocks: int
    decode_s: float
    tpot_s: float
    cached_tokens: int
    fetched_tokens: int = 0
    fetched_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request and its answer. `messages` is what was sent."""

    title: str
    messages: tuple[ChatCompletionMessageParam, ...]
    text: str
    finish: str
    prompt_tokens: int
    output_tokens: int
    times: StageTimes


@dataclass(slots=True)
class _Answer:
    """An answer as its chunks come in."""

    pieces: list[str] = field(default_factory=list)
    finish: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    times: StageTimes | None = None

    def add(self, chunk: ChatCompletionChunk) -> str:
        """Take a chunk in; gives its text."""
        if chunk.usage is not None:
            self.prompt_tokens = chunk.usage.prompt_tokens
            self.output_tokens = chunk.usage.completion_tokens
        if "baton" in (chunk.model_extra or {}):
            self.times = StageTimes.model_validate((chunk.model_extra or {})["baton"])
        if not chunk.choices:
            return ""
        choice = chunk.choices[0]
        self.finish = choice.finish_reason or self.finish
        piece = choice.delta.content or ""
        self.pieces.append(piece)
        return piece


class Chat:
    """Sends greedy chat requests to one router. Use it as `async with`."""

    def __init__(self, router_url: str, model: str, api_key: str) -> None:
        self._model = model
        self._client = openai.AsyncOpenAI(
            base_url=f"{router_url}/v1",
            api_key=api_key,
            max_retries=0,
            default_headers={"x-baton-timings": "1"},
            # A proxy of the environment has no business between us and this machine.
            http_client=httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT_S),
        )

    async def __aenter__(self) -> "Chat":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def conversation(
        self, questions: Sequence[str], on_turn: Callable[[str], OnText]
    ) -> list[Exchange]:
        """Turn after turn; each sends all that was said before."""
        messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": SYSTEM}]
        exchanges: list[Exchange] = []
        for turn, question in enumerate(questions, 1):
            messages.append({"role": "user", "content": question})
            exchange = await self._ask(f"chat, turn {turn}", messages, on_turn(question))
            messages.append({"role": "assistant", "content": exchange.text})
            exchanges.append(exchange)
        return exchanges

    async def at_once(self, questions: Sequence[str]) -> list[Exchange]:
        """All questions at the same time, as chats of one turn."""
        return await asyncio.gather(
            *(
                self._ask(
                    f"together, {number}",
                    [
                        {"role": "system", "content": SYSTEM},
                        {"role": "user", "content": question},
                    ],
                    lambda _piece: None,
                )
                for number, question in enumerate(questions, 1)
            )
        )

    async def _ask(
        self, title: str, messages: Sequence[ChatCompletionMessageParam], on_text: OnText
    ) -> Exchange:
        answer = _Answer()
        try:
            stream = await self._client.chat.completions.create(
                model=self._model,
                messages=list(messages),
                temperature=0.0,
                max_tokens=MAX_TOKENS,
                stream=True,
                stream_options={"include_usage": True},
            )
            async for chunk in stream:
                on_text(answer.add(chunk))
        except (openai.OpenAIError, httpx.HTTPError, ValidationError) as error:
            raise InternalError(f"the request '{title}' failed: {error}") from error
        if answer.times is None:
            raise InternalError(f"the answer to '{title}' came without its stage times")
        return Exchange(
            title=title,
            messages=tuple(messages),
            text="".join(answer.pieces),
            finish=answer.finish,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            times=answer.times,
        )
