"""Caches without time: what is forgotten first, and what counts as a hit."""

import pytest

from benchmarks.routing.lru import Lru, hit_share
from core.ids import BlockHash

A, B, C, D = (BlockHash(bytes([i] * 16)) for i in range(4))


def test_the_tail_of_a_prompt_is_forgotten_before_its_head() -> None:
    cache = Lru(3)
    assert cache.ask([A, B, C]) == 0
    assert cache.ask([D]) == 0
    assert cache.ask([A, B, C]) == 2


def test_only_leading_blocks_are_hits() -> None:
    cache = Lru(None)
    cache.ask([A, B])
    assert cache.ask([C, B]) == 0


def test_the_share_is_of_tokens_after_the_first_prompts_and_the_last_token_is_always_computed() -> (
    None
):
    prompts = [(8, [A, B]), (8, [A, B]), (12, [A, B])]
    assert hit_share(prompts, None, block_tokens=4) == pytest.approx((7 + 8) / 28)
    assert hit_share(prompts, None, block_tokens=4, skip=2) == pytest.approx(8 / 12)


def test_prompts_in_different_places_share_nothing() -> None:
    prompts = [(9, [A, B]), (9, [A, B]), (9, [A, B])]
    assert hit_share(prompts, None, block_tokens=4, places=[0, 1, 1]) == pytest.approx(8 / 27)
