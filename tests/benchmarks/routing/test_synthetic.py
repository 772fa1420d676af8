"""Drawn prompts have the shape they are drawn for."""

import statistics

from benchmarks.routing.synthetic import BLOCK_TOKENS, synthetic_prompts


def test_lengths_and_repetition_are_about_those_of_the_trace() -> None:
    prompts = synthetic_prompts(1000, 0)
    assert 6_000 < statistics.median(prompt.tokens for prompt in prompts) < 8_000
    seen = {block for prompt in prompts for block in prompt.hashes}
    blocks = sum(len(prompt.hashes) for prompt in prompts)
    assert 0.7 < len(seen) / blocks < 0.9, "0.79 of the trace's blocks are of one prompt only"
    assert len({prompt.hashes[0] for prompt in prompts}) == 1


def test_a_prompt_has_a_hash_per_full_block_and_no_more() -> None:
    for prompt in synthetic_prompts(200, 1):
        assert len(prompt.hashes) == prompt.tokens // BLOCK_TOKENS
        assert len(set(prompt.hashes)) == len(prompt.hashes)


def test_the_seed_decides() -> None:
    assert synthetic_prompts(50, 3) == synthetic_prompts(50, 3)
    assert synthetic_prompts(50, 3) != synthetic_prompts(50, 4)
