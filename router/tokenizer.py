"""Texts and chats to token ids, off the event loop, with one Hugging Face tokenizer directory.

Also reads what a checkpoint says of its own sampling and of the tokens that end an answer. Weights
are not touched.
"""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError
from transformers import AutoTokenizer

from core.errors import ConfigError, InvalidRequest, Overloaded
from core.openai import ChatMessage
from router.detokenize import Detokenizer, detokenizer_factory

MAX_WAITING_CHARS = 256 * 1024 * 1024
"""Text that may wait for a thread, over all requests; more is refused as overload."""

# What a template can raise on messages it was not written for, besides its own refusals.
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """The checkpoint's own sampling, for what a client leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Tokenizer:
    """One tokenizer and its threads. `close` it when the router stops."""

    def __init__(
        self,
        hf_tokenizer: Any,
        *,
        threads: int,
        defaults: SamplingDefaults,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.defaults = defaults
        self.eos_token_ids = eos_token_ids
        self._hf = hf_tokenizer
        # The backend's `encode` only reads, so threads share it; Hugging Face's own call sets
        # truncation and padding on it first, and fails when another thread is reading.
        self._backend = hf_tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size: int = len(hf_tokenizer)
        self._detokenizers = detokenizer_factory(self._backend)
        self._knows_developer = "developer" in str(hf_tokenizer.chat_template)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="tokenizer")
        self._waiting_chars = 0

    @classmethod
    def load(cls, directory: Path, threads: int) -> Self:
        """Load from a checkpoint directory. Raises ConfigError in one sentence."""
        if not directory.is_dir():
            raise ConfigError(f"model directory {directory} does not exist")
        config = _read_json(directory / "config.json")
        generation = _read_json(directory / "generation_config.json")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            _read_json(directory / name)
        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        except Exception as error:  # tokenizers raises nothing more special
            first_line = str(error).partition("\n")[0]
            raise ConfigError(f"cannot load a tokenizer from {directory}: {first_line}") from error
        if not hf_tokenizer.is_fast:
            raise ConfigError(f"{directory} has no fast tokenizer (tokenizer.json)")
        eos = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
        return cls(
            hf_tokenizer,
            threads=threads,
            defaults=_defaults(generation, directory),
            eos_token_ids=eos | _ids(hf_tokenizer.eos_token_id),
        )

    async def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a text, with the special tokens the tokenizer adds to one."""
        return await self._in_thread(len(text), lambda: self._encode(text, special=True))

    async def encode_chat(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Ids of a chat up to where the assistant speaks. Raises InvalidRequest.

        A template that does not know the role `developer` sees `system`.
        """
        if not self._hf.chat_template:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions", param="messages"
            )
        turns = [self._turn(message) for message in messages]
        size = sum(len(message.text) for message in messages)
        return await self._in_thread(size, lambda: self._encode_turns(turns))

    def detokenizer(self, after: Sequence[int] = ()) -> Detokenizer:
        """For one answer; `after` are the last tokens of a text that it continues."""
        return self._detokenizers.new(after)

    def close(self) -> None:
        """Running work ends by itself; waiting work is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, size: int, work: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        if self._waiting_chars and self._waiting_chars + size > MAX_WAITING_CHARS:
            raise Overloaded("too much text is waiting to be tokenized")
        self._waiting_chars += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting_chars -= size

    def _turn(self, message: ChatMessage) -> dict[str, str]:
        developer_as = "developer" if self._knows_developer else "system"
        role = developer_as if message.role == "developer" else message.role
        turn = {"role": role, "content": message.text}
        return turn if message.name is None else turn | {"name": message.name}

    def _encode_turns(self, turns: list[dict[str, str]]) -> tuple[int, ...]:
        try:
            text: str = self._hf.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=True
            )
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=special).ids)


def _read_json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} does not hold a JSON object")
    return content


def _ids(value: object) -> frozenset[int]:
    """`eos_token_id` is a number, a list of them, or absent."""
    ids = value if isinstance(value, list) else [value]
    return frozenset(item for item in ids if isinstance(item, int))


def _defaults(generation: dict[str, Any], directory: Path) -> SamplingDefaults:
    values = {
        name: generation[name]
        for name in ("temperature", "top_p", "top_k")
        if generation.get(name) is not None
    }
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise ConfigError(f"{directory / 'generation_config.json'}: {name} is {value!r}")
    return SamplingDefaults(
        temperature=float(values.get("temperature", 1.0)),
        top_p=float(values.get("top_p", 1.0)) or 1.0,
        top_k=int(values.get("top_k", 0)),
    )
