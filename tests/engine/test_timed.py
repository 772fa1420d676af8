"""The engine without a model: what it says depends on the tokens alone, and it proves its KV."""

from collections.abc import Callable, Sequence

import pytest

from core.errors import ConfigError, KvMismatch
from core.ids import BlockId
from engine.config import TimedConfig
from engine.latency.fitted import FittedLatency
from engine.timed import TimedEngine, step_shape
from engine.types import Sampled
from tests.builders import (
    VOCAB_SIZE,
    expected_tokens,
    make_config,
    make_engine,
    make_prompt,
    make_step,
)

PROMPT = make_prompt(11)
TABLE = (5, 2, 7)


def fill(engine: TimedEngine, tokens: Sequence[int], table: Sequence[int], name: str = "r") -> None:
    """Compute the KV of `tokens` into the blocks of `table`."""
    engine.step([make_step(tokens, 0, len(tokens), table, name=name, sample=False)])


def after(engine: TimedEngine, name: str = "reader") -> object:
    """The answer of a sequence that finds PROMPT's KV in TABLE and feeds one more token."""
    tokens = [*PROMPT, 1]
    return engine.step([make_step(tokens, len(PROMPT), len(tokens), TABLE, name=name)])[0]


def zero_a_block(engine: TimedEngine) -> None:
    engine.arena.data[2] = 0


def swap_two_blocks(engine: TimedEngine) -> None:
    engine.arena.data[[5, 2]] = engine.arena.data[[2, 5]].clone()


def take_another_prompts_block(engine: TimedEngine) -> None:
    fill(engine, make_prompt(11, seed=1), (0, 1, 3), name="other")
    engine.arena.data[2] = engine.arena.data[1]


def flip_one_byte(engine: TimedEngine) -> None:
    engine.arena.data[7, 0, 1, 1, 2, 3] ^= 1


def test_untouched_kv_is_accepted_and_continues_the_text() -> None:
    engine = make_engine(8)
    fill(engine, PROMPT, TABLE)
    assert after(engine) == Sampled(token=expected_tokens([*PROMPT, 1], 1)[0])


@pytest.mark.parametrize(
    "damage", [zero_a_block, swap_two_blocks, take_another_prompts_block, flip_one_byte]
)
def test_damaged_kv_fails_a_sequence_that_reads_it(damage: Callable[[TimedEngine], None]) -> None:
    engine = make_engine(8)
    fill(engine, PROMPT, TABLE)
    damage(engine)
    assert isinstance(after(engine), KvMismatch)


@pytest.mark.parametrize("damage", [zero_a_block, swap_two_blocks, take_another_prompts_block])
def test_damage_after_the_first_check_is_seen_too(damage: Callable[[TimedEngine], None]) -> None:
    engine = make_engine(8)
    fill(engine, PROMPT, TABLE)
    assert isinstance(after(engine), Sampled)
    damage(engine)
    assert isinstance(after(engine), KvMismatch)


def test_a_wrong_block_table_fails_the_sequence() -> None:
    engine = make_engine(8)
    fill(engine, PROMPT, TABLE)
    tokens = [*PROMPT, 1]
    wrong = make_step(tokens, len(PROMPT), len(tokens), (2, 5, 7), name="reader")
    assert isinstance(engine.step([wrong])[0], KvMismatch)


def test_damage_fails_only_the_sequence_it_befell() -> None:
    engine = make_engine(8)
    fill(engine, PROMPT, TABLE)
    zero_a_block(engine)
    tokens = [*PROMPT, 1]
    bad = make_step(tokens, len(PROMPT), len(tokens), TABLE, name="bad")
    good = make_step(PROMPT, 0, len(PROMPT), (0, 1, 3), name="good")
    first, second = engine.step([bad, good])
    assert isinstance(first, KvMismatch)
    assert isinstance(second, Sampled)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 11])
def test_kv_and_tokens_do_not_depend_on_chunking(chunk: int) -> None:
    whole, parts = make_engine(8), make_engine(8)
    fill(whole, PROMPT, TABLE)
    answer: object = None
    for start in range(0, len(PROMPT), chunk):
        end = min(len(PROMPT), start + chunk)
        (answer,) = parts.step([make_step(PROMPT, start, end, TABLE)])
    assert answer == Sampled(token=expected_tokens(PROMPT, 1)[0])
    assert (parts.arena.data == whole.arena.data).all()


def test_every_earlier_token_changes_the_next_one() -> None:
    answers = {
        expected_tokens([*PROMPT[:i], PROMPT[i] ^ 1, *PROMPT[i + 1 :]], 3)[0]
        for i in range(len(PROMPT))
    }
    assert len(answers - {expected_tokens(PROMPT, 1)[0]}) >= len(PROMPT) - 1


def test_it_never_says_an_end_token_by_itself() -> None:
    (said,) = set(expected_tokens(PROMPT, 1))
    engine = make_engine(8, eos_token_ids=[said, (said + 1) % VOCAB_SIZE])
    (answer,) = engine.step([make_step(PROMPT, 0, len(PROMPT), TABLE)])
    assert answer == Sampled(token=(said + 2) % VOCAB_SIZE)


TIMED = TimedConfig(
    prefill_base_ms=100,
    prefill_per_token_ms=10,
    prefill_per_token2_ms=1,
    decode_base_ms=1000,
    decode_per_sequence_ms=50,
    decode_per_context_token_ms=2,
)


@pytest.mark.parametrize(
    ("feeds", "milliseconds"),
    [
        ([(0, 4)], 100 + 40 + 16),
        ([(0, 4), (2, 5)], 100 + 70 + 49),
        ([(9, 10)], 1000 + 50 + 20),
        ([(9, 10), (4, 5)], 1000 + 100 + 30),
        ([(0, 4), (9, 10)], 100 + 40 + 16 + 1000 + 50 + 20),
        ([(0, 1)], 100 + 10 + 1),
    ],
    ids=["prefill", "two prefills", "decode", "two decodes", "mixed", "one-token prompt"],
)
def test_a_step_takes_the_time_of_the_latency_model(
    feeds: list[tuple[int, int]], milliseconds: float
) -> None:
    batch = [make_step([0] * end, start, end, range(3)) for start, end in feeds]
    assert FittedLatency.of(TIMED).step_s(step_shape(batch)) == pytest.approx(milliseconds / 1000)


def test_a_step_sleeps_its_model_time_once() -> None:
    slept: list[float] = []
    engine = make_engine(8, sleep=slept.append)
    step = make_step(PROMPT, 0, len(PROMPT), TABLE)
    engine.step([step])
    assert slept == [FittedLatency.of(TimedConfig()).step_s(step_shape([step]))]


def sparse_engine() -> TimedEngine:
    """Marks 1 in 64 KV bytes of 1 KiB per token: every 8th word of a row of 256 bytes."""
    timed = TimedConfig(kv_bytes_per_token=1024, num_layers=2, kv_marked_every_bytes=64)
    config = make_config().model_copy(update={"timed": timed, "kv_memory_mb": 0.1})
    return make_engine(config=config)


def test_sparse_marks_are_all_that_is_written() -> None:
    engine = sparse_engine()
    fill(engine, PROMPT, TABLE)
    words = engine.arena.data.numpy().view("uint64")
    assert (words[5, 0, :, :, :, ::8] != 0).all()
    assert not words[5, 0, :, :, :, 1:8].any()


@pytest.mark.parametrize("damage", [zero_a_block, swap_two_blocks])
def test_damage_to_sparse_marks_is_seen(damage: Callable[[TimedEngine], None]) -> None:
    engine = sparse_engine()
    fill(engine, PROMPT, TABLE)
    damage(engine)
    assert isinstance(after(engine), KvMismatch)


def test_kv_bytes_that_do_not_divide_into_words_are_refused() -> None:
    config = make_config()
    uneven = TimedConfig(kv_bytes_per_token=48, num_layers=2)
    with pytest.raises(ConfigError, match="multiple of 32"):
        make_engine(config=config.model_copy(update={"timed": uneven}))


def test_memory_for_no_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="holds no KV block"):
        make_engine(config=make_config().model_copy(update={"kv_memory_mb": 1e-6}))


def test_the_arena_has_the_blocks_its_memory_holds() -> None:
    engine = make_engine(13)
    assert engine.info.num_blocks == engine.arena.num_blocks == 13
    assert engine.arena.data[BlockId(12)].numel() == engine.info.layout.block_bytes
