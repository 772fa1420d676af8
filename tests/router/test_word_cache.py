"""The word cache against the tokenizer whose work it saves: the same ids, whatever the text."""

import json

import pytest
from http_builders import byte_level_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from router import word_cache
from router.word_cache import WordCache

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_PIECES = st.sampled_from(
    (
        *(
            " ",
            "  ",
            "\n",
            "\t",
            "\r\n",
            "\x1c",
            "\x85",
            "\u00a0",
            "\u2028",
            "\u3000",
            "\u200b",
            "\0",
        ),
        *("a", "be", "The", "'s", "'LL", "12", "3456", "?", "...", "_", "-", "²", "Ⅷ"),
        *("é", "e\u0301", "\u0301", "漢字", "😀", "<|user|>", "<|end|>"),
    )
)
_TEXTS = st.lists(_PIECES, max_size=16).map("".join) | st.lists(_PIECES, max_size=12).map(" ".join)


def _tokenizer(**changes: object) -> Tokenizer:
    """Runs of white space are tokens of their own, as in those that people use."""
    backend = byte_level_bpe("a   b \t  c\n\n d\t \n e " * 50)
    backend.add_special_tokens(["<|user|>", "<|end|>"])
    spec = json.loads(backend.to_str())
    for token in spec["added_tokens"]:
        token["normalized"] = False
    return Tokenizer.from_str(json.dumps(spec | changes))


def _split_by(pattern: str) -> dict[str, object]:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = [split | {"pattern": {"Regex": pattern}}, _BYTES | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def _cache(backend: Tokenizer) -> WordCache:
    cache = WordCache.of(backend)
    assert cache is not None
    return cache


_KINDS = {
    "gpt2": _tokenizer(),
    **{
        f"pattern-{i}": _tokenizer(pre_tokenizer=_split_by(pattern), normalizer={"type": "NFC"})
        for i, pattern in enumerate(word_cache._PATTERNS)
    },
}


@pytest.mark.parametrize("kind", _KINDS)
@settings(max_examples=600, deadline=None)
@given(texts=st.lists(_TEXTS, min_size=1, max_size=4))
def test_ids_equal_the_tokenizers_for_new_and_for_known_words(kind, texts):
    backend = _KINDS[kind]
    cache = _cache(backend)
    for text in [*texts, *texts]:
        assert cache.encode(text) == tuple(backend.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("space", [" ", "  ", "   ", "\t ", "\n ", " \t "])
def test_white_space_before_an_added_token_is_one_run(kind, space):
    backend = _KINDS[kind]
    cache = _cache(backend)
    for text in [f"a b{space}<|end|>\n<|user|>", "a <|end|>", f"<|user|>{space}<|end|> b"] * 2:
        assert cache.encode(text) == tuple(backend.encode(text, add_special_tokens=False).ids)


def test_known_words_are_not_encoded_again():
    asked: list[str] = []
    backend = _tokenizer()

    class Noting:
        def encode(self, text, add_special_tokens):
            asked.append(text)
            return backend.encode(text, add_special_tokens=add_special_tokens)

        def encode_batch_fast(self, texts, add_special_tokens):
            asked.extend(texts)
            return backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    cache = WordCache(Noting(), added=())
    cache.encode("a b c d e f g h a b")
    asked.clear()
    cache.encode("a b c d e new")
    assert asked == [" new"]


def test_what_is_kept_is_bounded_and_keeps_what_is_used(monkeypatch):
    monkeypatch.setattr(word_cache, "_GENERATION_WORDS", 64)
    backend = _tokenizer()
    cache = _cache(backend)
    for i in range(1000):
        text = f"the same word and {i}"
        assert cache.encode(text) == tuple(backend.encode(text, add_special_tokens=False).ids)
    assert len(cache._known) + len(cache._older) <= 2 * 64 + 8
    assert "same" in cache._known


def test_words_that_come_back_for_ever_are_bounded_too(monkeypatch):
    monkeypatch.setattr(word_cache, "_GENERATION_WORDS", 64)
    cache = _cache(_tokenizer())
    for i in range(200):
        cache.encode(f"a b c d e f g h {i}")
        cache.encode(" ".join(map(str, range(i))))
    assert len(cache._known) + len(cache._older) <= 2 * 64 + 8


def test_long_words_and_long_texts_are_not_kept(monkeypatch):
    cache = _cache(_tokenizer())
    cache.encode("a b c d e " + "x" * 1000)
    assert max(map(len, cache._known)) < 100
    monkeypatch.setattr(word_cache, "MAX_CHARS", 8)
    cache = _cache(_tokenizer())
    cache.encode("a b c d e f g h")
    assert not cache._known


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": _BYTES | {"add_prefix_space": True, "use_regex": True}},
        {"pre_tokenizer": _split_by(r"\s+\S")},
        {"pre_tokenizer": None},
    ],
)
def test_a_tokenizer_it_is_not_proven_for_has_none(change):
    assert WordCache.of(_tokenizer(**change)) is None


@pytest.mark.parametrize(
    "token",
    [AddedToken("two words"), AddedToken("<x>", lstrip=True), AddedToken("x", single_word=True)],
)
def test_an_added_token_that_minds_spaces_refuses_the_cache(token):
    backend = _tokenizer()
    backend.add_tokens([token])
    assert WordCache.of(backend) is None


def test_an_added_token_that_other_characters_become_refuses_the_cache():
    backend = _tokenizer(normalizer={"type": "NFC"})
    backend.add_tokens([AddedToken("<K>", normalized=True)])  # as the Kelvin sign does
    assert WordCache.of(backend) is None
