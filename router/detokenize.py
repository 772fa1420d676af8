"""Token ids to text, a token at a time, without ever splitting a character.

A detokenizer gives out text as soon as it is certain; the pieces joined are what decoding all ids
at once gives, special tokens left out. Two ways:

    ByteDetokenizer    a token is a run of bytes (byte-level BPE, SentencePiece with byte fallback):
                       a table lookup and an incremental UTF-8 decoder, constant work per token
    WindowDetokenizer  any other decoder: decode a window of the last tokens with and without the
                       new one, and give out the difference

`tokenizers.decoders.DecodeStream` is not used: on bytes that never become a character it decodes
all of them again for every token, and it has no way to give out an unfinished end.
"""

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"
_WINDOW_TOKENS = 16
_SENTENCEPIECE = ["Replace", "ByteFallback", "Fuse"]


class Detokenizer(Protocol):
    """One answer's. `push` every token in order, then `finish` once for what is still held."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizerFactory:
    """Makes detokenizers of one tokenizer. Built once; safe to share."""

    tokenizer: Tokenizer
    table: tuple[bytes, ...]
    """Bytes of every token id, empty for special ones; an empty table asks for the window."""
    strips_first_space: bool

    def new(self, after: Sequence[int] = ()) -> Detokenizer:
        """`after`: last tokens of the text that the answer continues, whose text is not given out.

        Without them the answer is a text of its own, and SentencePiece's leading space is dropped.
        """
        if self.table:
            strip = self.strips_first_space and not after
            return ByteDetokenizer(self.table, strip_first_space=strip)
        return WindowDetokenizer(self._decode, after)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def detokenizer_factory(tokenizer: Tokenizer) -> DetokenizerFactory:
    """Look at the tokenizer's decoder and choose the way."""
    spec = json.loads(tokenizer.to_str())["decoder"] or {}
    steps = spec.get("decoders", [spec])
    kinds = [step.get("type") for step in steps]
    table: list[bytes] = []
    if kinds == ["ByteLevel"]:
        table = _table(tokenizer, _byte_level_bytes)
    elif kinds[:3] == _SENTENCEPIECE and _is_plain_sentencepiece(steps[0], steps[3:]):
        table = _table(tokenizer, _byte_fallback_bytes)
    return DetokenizerFactory(
        tokenizer=tokenizer, table=tuple(table), strips_first_space=kinds[3:] == ["Strip"]
    )


class ByteDetokenizer:
    """Tokens as runs of bytes. A token id outside the table has no text."""

    __slots__ = ("_decode", "_strip", "_table")

    def __init__(self, table: Sequence[bytes], *, strip_first_space: bool) -> None:
        self._table = table
        self._strip = strip_first_space
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        try:
            text = self._decode(self._table[token])
        except IndexError:
            return ""
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """Any decoder whose output for a token depends on its neighbours only.

        tokens   |---- dropped ----|-- context --|-- new: not given out yet --|

    A new end that is U+FFFD may be half a character and waits, for at most a few tokens; as many
    tokens without any text are dropped. So the window, and the work per token, stay bounded.
    """

    __slots__ = ("_context", "_decode", "_tokens")

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int]) -> None:
        self._decode = decode
        self._tokens = list(after)
        self._context = len(self._tokens)

    def push(self, token: int) -> str:
        self._tokens.append(token)
        return self._take(at_end=len(self._tokens) - self._context > _WINDOW_TOKENS)

    def finish(self) -> str:
        return self._take(at_end=True)

    def _take(self, *, at_end: bool) -> str:
        before = self._decode(self._tokens[: self._context])
        text = self._decode(self._tokens)
        if not at_end and (len(text) <= len(before) or text.endswith(_REPLACEMENT)):
            return ""
        if len(text) <= len(before):
            del self._tokens[self._context :]
            return ""
        self._tokens = self._tokens[self._context :]
        self._context = len(self._tokens)
        return text[len(before) :]


def _table(tokenizer: Tokenizer, bytes_of: Callable[[str], bytes]) -> list[bytes]:
    added = tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, token_id in vocabulary.items():
        if token_id not in special:
            table[token_id] = bytes_of(token)
    return table


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte, inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    """A token with any character outside the alphabet was added as plain text."""
    try:
        return bytes([_BYTE_OF[char] for char in token])
    except KeyError:
        return token.encode()


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass
    return token.replace("▁", " ").encode()


def _is_plain_sentencepiece(replace: dict[str, object], rest: list[dict[str, object]]) -> bool:
    """Metaspace to space, and at most one leading space dropped."""
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    metaspace = replace.get("pattern") == {"String": "▁"} and replace.get("content") == " "
    return metaspace and rest in ([], [strip])
