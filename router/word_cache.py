"""Ids of a text out of the ids of its words, where that provably gives what the tokenizer gives.

Byte-level BPE cuts a text into words by a regular expression and encodes each alone, so a word's
ids may be kept. Here a text is cut at spaces only, which needs no such expression in Python:

    'The quick  brown fox'  ->  'The' ' quick ' ' brown' ' fox'

A space with something visible behind it begins a word under each of the expressions below. None
of their alternatives has such a space but as its first character: all other runs of white space
end in `(?!\\S)` or in a newline. None looks behind itself, and `(?!\\S)` sees the same at a space
as at the end of the text. So both sides of the cut may be encoded alone. Added tokens may not reach
over a cut, nor take spaces around them; a normalizer may be NFC, which joins no space to anything.
Before an added token the expression sees its text end, so all white space there is one run: no cut.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Self, cast

from tokenizers import Tokenizer

from core.blocks import PackedTokens, pack_tokens

MAX_CHARS = 32 * 1024
"""Of a text that is looked up: it is done in one go, with the interpreter lock held."""
_GENERATION_WORDS = 16_384
"""Kept are the words of the last texts, between one and two times so many."""
_WORD_CHARS = 48
"""Longer ones are rarely seen again."""
_LEARNED_PER_TEXT = 16
"""Of a text that is mostly new, which is encoded as a whole besides."""
_NEW_SHARE = 4
"""A text is mostly new when more than one in so many of its words is."""

_VISIBLE = r"[!-~\w]"
"""Letters, digits and what ASCII can print are no white space by any definition."""

_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
_PATTERNS = tuple(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
"""Of Llama 3 and of Qwen 2 and 3."""

Ids = bytes
"""Of a word, packed: to join a text's is one copy, and touches no id."""


class WordCache:
    """Of one tokenizer, without the special tokens it adds to a text. Threads may share it."""

    def __init__(self, backend: Tokenizer, added: Sequence[str]) -> None:
        self._backend = backend
        begin = f"(?!{'|'.join(map(re.escape, added))})" if added else ""
        begin += _VISIBLE
        self._begins_word = re.compile(begin).match
        self._cut = re.compile(f" (?={begin})").split
        # The first word of a text, which may follow no space, is kept behind a space of its own.
        self._known: dict[str, Ids] = {}
        self._older: dict[str, Ids] = {}

    @classmethod
    def of(cls, backend: Tokenizer) -> Self | None:
        """None for a tokenizer it is not proven for."""
        spec = json.loads(backend.to_str())
        is_bpe = spec["model"]["type"] == "BPE" and not spec["model"].get("dropout")
        plain = spec["normalizer"] in (None, {"type": "NFC"})
        added = spec["added_tokens"]
        within = all(_stays_within(token, spec["normalizer"] is not None) for token in added)
        ok = is_bpe and plain and within and _cuts_at_spaces(spec["pre_tokenizer"] or {})
        return cls(backend, [token["content"] for token in added]) if ok else None

    def encode(self, text: str) -> PackedTokens:
        """What the tokenizer gives for `text`."""
        return PackedTokens(self._packed(text))

    def _packed(self, text: str) -> Ids:
        if len(text) > MAX_CHARS:
            return self._encode(text)
        words = text.split(" ")
        words[0] = " " + words[0]
        found = list(map(self._known.get, words))
        if None in found:
            new = [i for i, ids in enumerate(found) if ids is None]
            if not all(self._begins_word(words[i]) for i in new if i):
                words = self._cut(text)  # elsewhere than at each space
                words[0] = " " + words[0]
                found = list(map(self._known.get, words))
                new = [i for i, ids in enumerate(found) if ids is None]
            new = [i for i in new if not self._recall(words, found, i)]
            if _NEW_SHARE * len(new) > len(words):
                for i in new[:_LEARNED_PER_TEXT]:
                    if len(words[i]) <= _WORD_CHARS:
                        self._learn(words[i])
                return self._encode(text)
            for i in new:
                found[i] = self._learn(words[i])
        return b"".join(cast(list[Ids], found))

    def _recall(self, words: list[str], found: list[Ids | None], i: int) -> bool:
        """A word of the older generation that is still used belongs to the new one."""
        ids = found[i] = self._older.get(words[i])
        if ids is not None:
            self._keep(words[i], ids)
        return ids is not None

    def _learn(self, word: str) -> Ids:
        text = word[1:] if word[0] == " " else " " + word
        if len(word) > _WORD_CHARS:
            return self._encode(text)
        # Of so little text `encode`, which keeps the interpreter lock, is the cheaper way.
        ids = pack_tokens(self._backend.encode(text, add_special_tokens=False).ids)
        self._keep(word, ids)
        return ids

    def _keep(self, word: str, ids: Ids) -> None:
        if len(self._known) >= _GENERATION_WORDS:
            self._older, self._known = self._known, {}
        self._known[word] = ids

    def _encode(self, text: str) -> Ids:
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return pack_tokens(encoding.ids)


def _cuts_at_spaces(pre_tokenizer: dict[str, Any]) -> bool:
    steps = [{**step, "trim_offsets": None} for step in pre_tokenizer.get("pretokenizers", [])]
    if not steps:
        return {**pre_tokenizer, "trim_offsets": None} == {**_GPT2, "trim_offsets": None}
    return steps in [
        [
            {**_SPLIT, "pattern": {"Regex": pattern}, "trim_offsets": None},
            {**_BYTES, "trim_offsets": None},
        ]
        for pattern in _PATTERNS
    ]


def _stays_within(token: dict[str, Any], normalizes: bool) -> bool:
    """The added token holds no space, minds not what is around it, and is found as it reads."""
    minds = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not minds and " " not in token["content"] and not (normalizes and token["normalized"])
