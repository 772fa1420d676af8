"""Texts and chats to token ids with one Hugging Face tokenizer; long ones off the event loop."""

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from core import telemetry
from core.blocks import PackedTokens, pack_tokens
from core.errors import ConfigError, InvalidRequest, Overloaded
from core.json_body import Object
from core.openai import ChatMessage
from engine.weights import check_tokenizer, read_json
from router.detokenize import Detokenizer, detokenizer_factory
from router.word_cache import WordCache

MAX_WAITING_CHARS = 256 * 1024 * 1024
"""Text that may wait for a thread, over all requests; more is refused as overload."""

_TURN_CHARS = 64
"""What a chat's message counts besides its text: the template runs once for each."""

INLINE_CHARS = 2048
"""A request's texts up to here, together, are tokenized on the event loop, within a millisecond: to
hand them to a thread and back costs about as much CPU, and the wait for the interpreter lock more
time.
"""

MAX_REASON_CHARS = 300
"""Of what a template says on refusing, which may hold a message's text."""

# What a template can raise on what it was not written for, besides its own refusals.
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
)

_RENDERING = frozenset(inspect.signature(render_jinja_template).parameters) - {"documents"}
_NOT_THE_CLIENTS = _RENDERING | {"messages", "self"}
"""Names of no variable that a client may set; special tokens come on top."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Tokenizer:
    """One tokenizer and its threads. `close` it when the router stops."""

    def __init__(self, hf_tokenizer: Any, *, threads: int) -> None:
        # The backend's `encode` only reads, so threads share it; Hugging Face's own call sets
        # truncation and padding on it first, and fails when another thread is reading.
        self._backend = hf_tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = len(hf_tokenizer)
        self._detokenizers = detokenizer_factory(self._backend)
        self._words = WordCache.of(self._backend)
        self._adds_special = bool(self._backend.encode("", add_special_tokens=True).ids)
        # What `apply_chat_template` looks up anew for every chat.
        self._template = _default_template(hf_tokenizer)
        self._special_tokens: dict[str, str] = dict(hf_tokenizer.special_tokens_map)
        self._own_variables = _NOT_THE_CLIENTS.union(
            hf_tokenizer.SPECIAL_TOKENS_ATTRIBUTES, self._special_tokens
        )
        self._knows_developer = "developer" in str(hf_tokenizer.chat_template)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._waiting_chars = 0

    @classmethod
    def load(cls, directory: Path, threads: int) -> Self:
        """Load from a checkpoint directory. Raises ConfigError in one sentence.

        tokenizer.json alone is enough, for all but chats.
        """
        check_tokenizer(directory)
        # Without its config AutoTokenizer goes by config.json's model type, which may rebuild parts
        # of the tokenizer in place of what tokenizer.json says.
        kind: Any = PreTrainedTokenizerFast
        settings = directory / "tokenizer_config.json"
        if settings.is_file():
            read_json(settings)
            kind = AutoTokenizer
        try:
            hf_tokenizer = kind.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # tokenizers raises nothing more special
            first_line = str(error).partition("\n")[0]
            raise ConfigError(f"cannot load a tokenizer from {directory}: {first_line}") from error
        if not hf_tokenizer.is_fast:
            raise ConfigError(f"{directory} has no fast tokenizer (tokenizer.json)")
        if not hf_tokenizer.chat_template:
            log.warning("%s", telemetry.log_line("no_chat_template", directory=directory))
        return cls(hf_tokenizer, threads=threads)

    async def encode_texts(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of each text, with the special tokens the tokenizer adds to one."""
        size = sum(map(len, texts))
        return await self._in_thread(
            size, lambda: [self._encode(text, special=True) for text in texts]
        )

    async def encode_chat(
        self, messages: Sequence[ChatMessage], variables: Object
    ) -> Sequence[int]:
        """Ids of a chat up to where the assistant speaks; `variables` are the client's, for the
        template. Raises InvalidRequest.

        A template that does not know the role `developer` sees `system`.
        """
        if not self._template:
            raise InvalidRequest(
                "this model has no chat template, which chats need; use /v1/completions, or add a "
                "chat_template.jinja to the model's directory",
                param="messages",
            )
        size = sum(map(_size, messages))
        if variables:
            self._check_variables(variables)
            size += len(str(variables))
        return await self._in_thread(size, lambda: self._encode_turns(messages, variables))

    def detokenizer(self, after: Sequence[int] = ()) -> Detokenizer:
        """For one answer; `after` are the last tokens of a text that it continues."""
        return self._detokenizers.new(after)

    def close(self) -> None:
        """Running work ends by itself; waiting work is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, size: int, work: Callable[[], T]) -> T:
        if size <= INLINE_CHARS:
            return work()
        if self._waiting_chars and self._waiting_chars + size > MAX_WAITING_CHARS:
            raise Overloaded("too much text is waiting to be tokenized")
        self._waiting_chars += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting_chars -= size

    def _check_variables(self, variables: Object) -> None:
        for name in variables.keys() & self._own_variables:
            where = f"chat_template_kwargs.{name}"
            raise InvalidRequest(f"'{where}' is not for the client to set", param=where)

    def _turn(self, message: ChatMessage) -> dict[str, str]:
        developer_as = "developer" if self._knows_developer else "system"
        role = developer_as if message.role == "developer" else message.role
        turn = {"role": role, "content": message.text}
        return turn if message.name is None else turn | {"name": message.name}

    def _encode_turns(self, messages: Sequence[ChatMessage], variables: Object) -> Sequence[int]:
        turns = [self._turn(message) for message in messages]
        try:
            (text,), _ = render_jinja_template(
                [turns],
                chat_template=self._template,
                add_generation_prompt=True,
                **self._special_tokens,
                **variables,
            )
        except _TEMPLATE_ERRORS as error:
            reason = str(error)[:MAX_REASON_CHARS]
            what = "these messages" + (" with these 'chat_template_kwargs'" if variables else "")
            raise InvalidRequest(
                f"the model's chat template refuses {what}: {reason}", param="messages"
            ) from error
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> Sequence[int]:
        special = special and self._adds_special
        if self._words is not None and not special:
            return self._words.encode(text)
        # `encode` keeps offsets into the text besides, which takes a third more time.
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
        return PackedTokens(pack_tokens(encoding.ids))


def _default_template(hf_tokenizer: Any) -> str:
    """Empty where there is none, or several and none of them the default."""
    templates = hf_tokenizer.chat_template
    return str(templates.get("default", "") if isinstance(templates, dict) else templates or "")


def _size(message: ChatMessage) -> int:
    """Characters, for the bounds on what is tokenized where."""
    return len(message.text) + len(message.name or "") + _TURN_CHARS
