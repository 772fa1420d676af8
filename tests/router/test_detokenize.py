"""Pieces joined are the decoded whole; no piece ever holds half a character."""

import time

import pytest
from http_builders import TEXT, byte_level_bpe
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from router.detokenize import (
    ByteDetokenizer,
    DetokenizerFactory,
    WindowDetokenizer,
    detokenizer_factory,
)

SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
PLAIN = settings(max_examples=150, deadline=None, database=None)
UNICODE = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="▁"))


def byte_fallback(decoder: object) -> Tokenizer:
    """A SentencePiece-like tokenizer: a few words, every byte, a special token."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"▁abcdefgh.", "▁a", "▁b", "ab", "▁▁", "cd", "▁fgh"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "▁"), ("c", "d")]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    built.decoder = decoder
    built.add_special_tokens(["<s>"])
    return built


LLAMA = byte_fallback(decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)]))
GEMMA = byte_fallback(decoders.Sequence(SENTENCEPIECE))
METASPACE = byte_fallback(decoders.Metaspace())
BPE = byte_level_bpe()


def pieces_of(factory: DetokenizerFactory, tokens: list[int], after: tuple[int, ...] = ()) -> list:
    detokenizer = factory.new(after)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@given(text=st.one_of(UNICODE, st.text(alphabet="ab <|end>�é🎉日", max_size=30)))
@PLAIN
def test_byte_level_text_comes_back_whole_and_unbroken(text):
    pieces = pieces_of(detokenizer_factory(BPE), BPE.encode(text).ids)
    assert "".join(pieces) == BPE.decode(BPE.encode(text).ids)
    assert all("�" not in piece for piece in pieces) or "�" in text


@given(tokens=st.lists(st.integers(0, BPE.get_vocab_size() - 1), max_size=40))
@PLAIN
def test_any_byte_level_ids_even_broken_bytes_decode_as_a_whole(tokens):
    assert "".join(pieces_of(detokenizer_factory(BPE), tokens)) == BPE.decode(tokens)


@given(text=UNICODE, cut=st.integers(0, 200))
@PLAIN
def test_ids_cut_anywhere_decode_as_a_whole(text, cut):
    tokens = BPE.encode(text).ids[:cut]
    assert "".join(pieces_of(detokenizer_factory(BPE), tokens)) == BPE.decode(tokens)


@pytest.mark.parametrize("built", [LLAMA, GEMMA], ids=["llama", "gemma"])
@given(text=st.one_of(UNICODE, st.text(alphabet="abcd  é🎉日", max_size=30)))
@PLAIN
def test_byte_fallback_text_comes_back_whole_and_unbroken(built, text):
    tokens = built.encode(text).ids
    pieces = pieces_of(detokenizer_factory(built), tokens)
    assert "".join(pieces) == built.decode(tokens)
    assert all("�" not in piece for piece in pieces) or "�" in text


@pytest.mark.parametrize("built", [LLAMA, GEMMA, METASPACE], ids=["llama", "gemma", "metaspace"])
@given(data=st.data())
@PLAIN
def test_any_ids_without_bytes_decode_as_a_whole(built, data):
    size = built.get_vocab_size()
    tokens = data.draw(st.lists(st.sampled_from([1, *range(258, size)]), max_size=40))
    assert "".join(pieces_of(detokenizer_factory(built), tokens)) == built.decode(tokens)


def test_the_fast_way_is_taken_where_it_can_be():
    kinds = [type(detokenizer_factory(built).new()) for built in (BPE, LLAMA, GEMMA, METASPACE)]
    assert kinds == [ByteDetokenizer, ByteDetokenizer, ByteDetokenizer, WindowDetokenizer]


def test_unfinished_character_waits_and_comes_at_the_end():
    detokenizer = detokenizer_factory(GEMMA).new()
    euro = [GEMMA.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode()]
    assert [detokenizer.push(token) for token in euro] == ["", "", "€"]
    assert [detokenizer.push(token) for token in euro[:2]] == ["", ""]
    assert detokenizer.finish() == "�"


@pytest.mark.parametrize("built", [LLAMA, METASPACE], ids=["llama", "metaspace"])
def test_first_space_stays_where_an_answer_continues_a_text(built):
    prompt, answer = built.encode("ab").ids, built.encode(" a b").ids
    factory = detokenizer_factory(built)
    assert "".join(pieces_of(factory, answer)) == "a b"
    assert "".join(pieces_of(factory, answer, tuple(prompt))) == " a b"


@pytest.mark.parametrize("built", [BPE, GEMMA, METASPACE], ids=["bpe", "gemma", "metaspace"])
def test_ids_without_a_token_have_no_text(built):
    fox = built.encode("ab").ids
    unknown = [10**6, built.get_vocab_size() + 3]
    pieces = pieces_of(detokenizer_factory(built), [*unknown, *fox, *unknown])
    assert "".join(pieces) == "ab"


@pytest.mark.parametrize("built", [GEMMA, METASPACE], ids=["bytes", "window"])
def test_endless_broken_bytes_or_silence_cost_no_more_per_token(built):
    """Decoding all that is held again for every token would take minutes here."""
    detokenizer = detokenizer_factory(built).new()
    started_s = time.perf_counter()
    for _ in range(20_000):
        detokenizer.push(2 + 0x80)
        detokenizer.push(10**6)
    assert time.perf_counter() - started_s < 5


def test_text_flows_while_it_is_spoken():
    tokens = BPE.encode(TEXT).ids
    pieces = pieces_of(detokenizer_factory(BPE), tokens)
    assert sum(1 for piece in pieces if piece) > 0.8 * len(tokens)
