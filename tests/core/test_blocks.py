import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import (
    HASH_BYTES,
    PackedTokens,
    chain_hashes,
    join_tokens,
    pack_tokens,
    root_hash,
    unpack_tokens,
)
from core.ids import ModelId
from tests.builders import QUICK

ROOT = root_hash(ModelId("m"))
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(chain_hashes(list(range(n)), 4, ROOT)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_hash_has_128_bits() -> None:
    assert {len(h) for h in [ROOT, *chain_hashes(range(8), 4, ROOT)]} == {HASH_BYTES}


def test_equal_blocks_after_different_prefixes_differ() -> None:
    first = chain_hashes([1, 2, 7, 8], 2, ROOT)
    second = chain_hashes([3, 4, 7, 8], 2, ROOT)
    assert first[1] != second[1]


def test_model_and_tenant_separate_the_same_tokens() -> None:
    roots = {root_hash(ModelId(m), salt) for m in ("a", "b") for salt in ("", "x", "y")}
    assert len(roots) == 6


def test_salt_and_model_do_not_run_into_each_other() -> None:
    assert root_hash(ModelId("ab"), "c") != root_hash(ModelId("a"), "bc")


def test_a_hash_is_this_value_for_ever() -> None:
    """Workers of different versions share caches by it; changing it is a protocol change."""
    root = root_hash(ModelId("model"), "salt")
    assert chain_hashes([1, 2, 3, 4], 4, root)[0].hex() == "d3e0c009cafb21ab92c4f366d01002be"


@QUICK
@given(TOKENS, TOKENS, st.integers(1, 5))
def test_equal_hashes_exactly_for_equal_prefixes(a: list[int], b: list[int], size: int) -> None:
    pairs = zip(chain_hashes(a, size, ROOT), chain_hashes(b, size, ROOT), strict=False)
    for i, (left, right) in enumerate(pairs, 1):
        assert (left == right) == (a[: i * size] == b[: i * size])


@QUICK
@given(TOKENS, st.integers(1, 5), st.integers(0, 8))
def test_a_chain_may_be_computed_in_two_parts(tokens: list[int], size: int, cut: int) -> None:
    whole = chain_hashes(tokens, size, ROOT)
    head = whole[:cut]
    tail = chain_hashes(tokens[len(head) * size :], size, head[-1] if head else ROOT)
    assert [*head, *tail] == whole


@QUICK
@given(TOKENS)
def test_packed_tokens_come_back(tokens: list[int]) -> None:
    assert unpack_tokens(pack_tokens(tokens)) == tuple(tokens)


def test_tokens_are_packed_like_this_for_ever() -> None:
    assert pack_tokens([1, 2**32 - 1]).hex() == "01000000ffffffff"


def test_a_token_cut_in_two_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        unpack_tokens(b"12345")


@QUICK
@given(TOKENS, st.integers(-50, 50), st.integers(-50, 50))
def test_packed_tokens_read_as_the_tuple_they_were(ids: list[int], start: int, end: int) -> None:
    packed, plain = PackedTokens(pack_tokens(ids)), tuple(ids)
    assert (len(packed), tuple(packed), packed[start:end]) == (len(ids), plain, plain[start:end])
    assert [packed[i] for i in range(-len(ids), len(ids))] == [*ids, *ids]
    assert packed == plain and hash(packed) == hash(plain)
    assert packed == PackedTokens(pack_tokens(plain)) and packed != (*plain, 1)
    assert pack_tokens(packed) == pack_tokens(plain)


def test_tokens_joined_to_packed_ones_hash_and_travel_as_all_of_them() -> None:
    packed = PackedTokens(pack_tokens(range(40)))
    whole = tuple(range(50))
    joined = join_tokens(packed, range(40, 50))
    assert join_tokens(packed, ()) is packed
    assert joined == whole and pack_tokens(joined) == pack_tokens(whole)
    assert chain_hashes(joined, 16, ROOT) == chain_hashes(whole, 16, ROOT)
