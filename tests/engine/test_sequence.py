from core.blocks import chain_hashes, root_hash
from core.sampling import FinishReason
from engine.pool import BlockPool
from engine.types import Sampled
from tests.builders import BLOCK_SIZE, make_engine, make_sequence

ROOT = root_hash(make_engine(1).info.model_id)


def test_a_chunk_that_leaves_tokens_over_does_not_sample() -> None:
    sequence = make_sequence(range(10))
    step = sequence.make_step(4)
    assert (step.start, step.end, step.sample) == (0, 4, None)


def test_the_chunk_that_reaches_the_last_token_samples() -> None:
    sequence = make_sequence(range(10), output_position=3)
    sequence.computed = 4
    step = sequence.make_step(6)
    assert (step.start, step.end, step.sample) == (4, 10, sequence.sampling)
    assert step.output_position == 3


def test_output_positions_count_on_from_an_earlier_attempt() -> None:
    sequence = make_sequence(range(10), output_position=3, max_tokens=100)
    sequence.append(Sampled(token=1))
    assert sequence.next_output_position == 4


def test_max_tokens_counts_the_output_of_earlier_attempts() -> None:
    sequence = make_sequence(range(10), output_position=3, max_tokens=5)
    assert sequence.append(Sampled(token=1)) is None
    assert sequence.append(Sampled(token=1)) is FinishReason.LENGTH


def test_a_stop_token_ends_with_stop_even_at_the_limit() -> None:
    sequence = make_sequence(range(10), max_tokens=1, stop_token_ids=[7])
    assert sequence.append(Sampled(token=7)) is FinishReason.STOP


def test_hashes_follow_the_tokens_as_they_grow() -> None:
    sequence = make_sequence(range(6), max_tokens=100)
    assert len(sequence.block_hashes(1, BLOCK_SIZE)) == 1
    for token in (6, 7):
        sequence.append(Sampled(token=token))
    assert sequence.block_hashes(2, BLOCK_SIZE) == chain_hashes(range(8), BLOCK_SIZE, ROOT)


def test_only_full_and_computed_blocks_are_published() -> None:
    pool = BlockPool(4)
    sequence = make_sequence(range(10))
    sequence.blocks = pool.allocate(3) or []
    sequence.computed = 7
    sequence.publish(pool, BLOCK_SIZE)
    assert pool.hashes() == chain_hashes(range(4), BLOCK_SIZE, ROOT)


def test_publishing_what_another_has_takes_over_its_block() -> None:
    pool = BlockPool(4)
    first, second = make_sequence(range(4)), make_sequence(range(4))
    for sequence in (first, second):
        sequence.blocks = pool.allocate(1) or []
        sequence.computed = 4
        sequence.publish(pool, BLOCK_SIZE)
    assert second.blocks == first.blocks
    assert pool.counts().in_use == 1
    pool.check()
