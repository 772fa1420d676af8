"""From a parsed HTTP request to the sequences to generate: model, prompts, room, sampling."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from core.clock import Clock
from core.errors import ContextTooLong, InvalidRequest, ModelNotFound, NoWorkers
from core.ids import RequestId
from core.json_body import shortened
from core.openai import (
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    OpenAiRequest,
)
from core.sampling import SamplingParams
from engine.build import ServedModel
from router.tokenizer import Tokenizer
from router.types import GenerateRequest, Generator

_SEED_MASK = 2**63 - 1
_CONTEXT_TAIL = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedChoice:
    """One choice to generate. `after` is the end of a text that its answer continues."""

    request: GenerateRequest
    after: tuple[int, ...]
    counts_prompt: bool
    """The first choice of its prompt: usage counts a prompt once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that one HTTP request asks for."""

    model: str
    chat: bool
    stream: bool
    include_usage: bool
    running_usage: bool
    stops: tuple[str, ...]
    choices: tuple[PlannedChoice, ...]

    @property
    def prompt_tokens(self) -> int:
        counted = (choice for choice in self.choices if choice.counts_prompt)
        return sum(len(choice.request.prompt_tokens) for choice in counted)


class Planner:
    """Makes plans. Tokenization, the only slow part, runs in the tokenizer's threads."""

    def __init__(
        self,
        *,
        generator: Generator,
        tokenizer: Tokenizer,
        model: ServedModel,
        model_names: Sequence[str],
        clock: Clock,
    ) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._model = model
        self._model_names = tuple(model_names)
        self._clock = clock

    async def plan(self, body: OpenAiRequest, request_id: RequestId, ends_s: float) -> Plan:
        """`ends_s` is the clock's time by which the request ends. Raises InvalidRequest,
        ModelNotFound, Overloaded, NoWorkers.
        """
        self._check_model(body.model)
        per_prompt = body.n or 1
        _check_choices(body, per_prompt)
        prompts = await self._prompts(body)
        chat = isinstance(body, ChatCompletionRequest)
        seed = secrets.randbits(63) if body.seed is None else body.seed & _SEED_MASK
        choices: list[PlannedChoice] = []
        for prompt in prompts:
            sampling = self._sampling(body, seed, self._room(body, len(prompt)))
            for i in range(per_prompt):
                request = GenerateRequest(
                    request_id=request_id,
                    choice=len(choices),
                    prompt_tokens=prompt,
                    sampling=sampling,
                    deadline_s=max(0.0, ends_s - self._clock.now_s()),
                    cache_salt=body.cache_salt or "",
                )
                after = () if chat else tuple(prompt[-_CONTEXT_TAIL:])
                choices.append(PlannedChoice(request=request, after=after, counts_prompt=i == 0))
        return Plan(
            model=body.model,
            chat=chat,
            stream=bool(body.stream),
            include_usage=body.include_usage,
            running_usage=body.running_usage,
            stops=tuple(body.stop),
            choices=tuple(choices),
        )

    def _check_model(self, model: str) -> None:
        if model not in self._model_names:
            served = ", ".join(f"'{name}'" for name in self._model_names)
            raise ModelNotFound(
                f"the model '{shortened(model)}' does not exist; this server has {served}",
                param="model",
            )

    async def _prompts(self, body: OpenAiRequest) -> list[Sequence[int]]:
        prompts: list[Sequence[int]] = []
        if isinstance(body, ChatCompletionRequest):
            variables = body.chat_template_kwargs
            prompts.append(await self._tokenizer.encode_chat(body.messages, variables))
        elif isinstance(body, CompletionRequest):
            texts = [item for item in body.prompt if isinstance(item, str)]
            ids = [item for item in body.prompt if not isinstance(item, str)]
            # The type allows no mixture: one of the two is empty.
            prompts.extend(await self._tokenizer.encode_texts(texts))
            prompts.extend(self._checked_tokens(body, item) for item in ids)
        if not all(prompts):
            raise InvalidRequest("the prompt has no tokens", param=_prompt_param(body))
        return prompts

    def _checked_tokens(self, body: OpenAiRequest, tokens: list[int]) -> tuple[int, ...]:
        self._room(body, len(tokens))  # before millions are looked at
        vocab_size = self._tokenizer.vocab_size
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise InvalidRequest(
                f"'prompt' holds a token id outside 0 to {vocab_size - 1}", param="prompt"
            )
        return tuple(tokens)

    def _room(self, body: OpenAiRequest, prompt_tokens: int) -> int:
        """Tokens the answer may have."""
        limits = self._generator.limits()
        if limits.context_tokens <= 0:
            raise NoWorkers("no worker is connected; try again later")
        room = limits.context_tokens - prompt_tokens
        # LiteLLM and LangChain, whose ways to go on with more room or less prompt hang on it, know
        # the error by these words, OpenAI's and Anthropic's, and not by its code.
        holds = f"this model's maximum context length is {limits.context_tokens} tokens"
        if room < 1:
            raise ContextTooLong(
                f"{holds}, answer included; the prompt is too long: it has {prompt_tokens}",
                param=_prompt_param(body),
            )
        wanted = body.answer_tokens
        if wanted is not None and wanted > room:
            raise ContextTooLong(
                f"{holds}; the prompt has {prompt_tokens} and the answer may have {wanted}",
                param="max_completion_tokens" if body.max_tokens is None else "max_tokens",
            )
        return room if wanted is None else wanted

    def _sampling(self, body: OpenAiRequest, seed: int, max_tokens: int) -> SamplingParams:
        """What the request leaves out, the checkpoint says; what it leaves out too, OpenAI."""
        defaults = self._model.sampling
        own_ends = frozenset() if body.ignore_eos else self._model.eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            temperature=_first(body.temperature, defaults.temperature, 1.0),
            top_p=_first(body.top_p, defaults.top_p, 1.0),
            top_k=max(0, _first(body.top_k, defaults.top_k, 0)),
            stop_token_ids=own_ends | frozenset(body.stop_token_ids or ()),
        )


def _first(asked: T | None, default: T | None, otherwise: T) -> T:
    if asked is not None:
        return asked
    return otherwise if default is None else default


def _check_choices(body: OpenAiRequest, per_prompt: int) -> None:
    """Before anything is tokenized: many short prompts cost more than one long one."""
    prompts = len(body.prompt) if isinstance(body, CompletionRequest) else 1
    if prompts * per_prompt > MAX_CHOICES:
        raise InvalidRequest(
            f"{prompts} prompts times n = {per_prompt} is more than {MAX_CHOICES} choices",
            param="n",
        )


def _prompt_param(body: OpenAiRequest) -> str:
    return "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
