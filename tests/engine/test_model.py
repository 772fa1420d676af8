"""The engine over real architectures, token for token against transformers' own generate."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.errors import BatonError, ConfigError, InternalError, InvalidRequest
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.model import HfEngine, load_engine
from engine.types import Sampled
from tests.driving import (
    GREEDY,
    Driven,
    Reference,
    random_prompt,
    run_mixed,
    start_sequences,
)
from tests.models import CONTEXT_TOKENS, FAMILIES, SLIDING_WINDOW, VOCAB_SIZE, write_checkpoint

CONFIG = EngineConfig(kv_memory_mb=4)
EDGES = (1, 2, 15, 16, 17, 63, 64, 65, 128, 129, 200)
OUTPUT_TOKENS = 12


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory per family, written once for this module."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        write_checkpoint(root / family, family)
    return root


def poison(engine: HfEngine) -> None:
    """Whatever the engine does not write itself must not matter."""
    engine.arena.data.fill_(float("nan"))


def start_one(engine: HfEngine, num_tokens: int, *, outputs: int, seed: int = 0) -> Driven:
    (sequence,) = start_sequences(
        engine, [random_prompt(num_tokens, seed)], max_tokens=outputs, seed=seed
    )
    return sequence


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_equal_generate(checkpoints: Path, family: str) -> None:
    reference = Reference(checkpoints / family)
    engine = load_engine(checkpoints / family, CONFIG)
    poison(engine)
    prompts = [random_prompt(n) for n in EDGES]
    sequences = start_sequences(engine, prompts, max_tokens=OUTPUT_TOKENS)
    run_mixed(engine, sequences, max_tokens=OUTPUT_TOKENS)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        truth = reference.generate(prompt, OUTPUT_TOKENS)
        assert sequence.output == truth.tokens, f"prompt of {len(prompt)}"
        torch.testing.assert_close(torch.stack(sequence.logits), truth.logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_chunk_size_does_not_change_the_text(checkpoints: Path, chunk: int) -> None:
    engine = load_engine(checkpoints / "gemma3", CONFIG)
    texts = []
    for size in (64, chunk):
        poison(engine)
        sequence = start_one(engine, 100, outputs=8)
        run_mixed(engine, [sequence], max_tokens=8, chunk=size)
        texts.append(sequence.output)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("block_size", [1, 5, 32])
def test_block_size_does_not_change_the_text(checkpoints: Path, block_size: int) -> None:
    prompt = random_prompt(90)
    truth = Reference(checkpoints / "mistral").generate(prompt, 8)
    engine = load_engine(
        checkpoints / "mistral", EngineConfig(kv_memory_mb=4, block_size=block_size)
    )
    poison(engine)
    (sequence,) = start_sequences(engine, [prompt], max_tokens=8)
    run_mixed(engine, [sequence], max_tokens=8)
    assert sequence.output == truth.tokens


def test_a_long_and_many_short_decodes_share_a_step(checkpoints: Path) -> None:
    reference = Reference(checkpoints / "gemma2")
    engine = load_engine(checkpoints / "gemma2", EngineConfig(kv_memory_mb=16))
    poison(engine)
    prompts = [random_prompt(n) for n in (900, 3, 300, 40, 410, 20, 33)]
    sequences = start_sequences(engine, prompts, max_tokens=6)
    run_mixed(engine, sequences, max_tokens=6, chunk=512, stagger=0)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert sequence.output == reference.generate(prompt, 6).tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_vary_and_depend_on_early_context(checkpoints: Path, family: str) -> None:
    engine = load_engine(checkpoints / family, CONFIG)
    for prompt in (random_prompt(17, seed=5), random_prompt(200, seed=5)):
        other = random_prompt(16, seed=6) + prompt[16:]
        sequences = start_sequences(engine, [prompt, other], max_tokens=64)
        run_mixed(engine, sequences, max_tokens=64)
        assert len(set(sequences[0].output)) >= 20
        assert sequences[0].output != sequences[1].output


@pytest.mark.parametrize("harm", ["zero", "swap"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_block_changes_the_answer(checkpoints: Path, family: str, harm: str) -> None:
    engine = load_engine(checkpoints / family, CONFIG)
    sound = start_one(engine, 200, outputs=32)
    run_mixed(engine, [sound], max_tokens=32)

    prompts = [random_prompt(200), random_prompt(200, seed=1)]
    harmed, other = start_sequences(engine, prompts, max_tokens=32)
    run_mixed(engine, [harmed, other], max_tokens=1)
    # Inside of every window as seen from the first decoded position. The swap is with another
    # sequence's block: attention does not notice two blocks of one sequence trading places.
    inside = (200 - SLIDING_WINDOW) // 16 + 1
    mine, foreign = harmed.table[inside], other.table[inside]
    if harm == "zero":
        engine.arena.data[mine] = 0
    else:
        engine.arena.data[[mine, foreign]] = engine.arena.data[[foreign, mine]]
    run_mixed(engine, [harmed], max_tokens=32)
    assert harmed.output[0] == sound.output[0]
    assert harmed.output != sound.output


def test_a_block_behind_the_window_is_never_read(checkpoints: Path) -> None:
    engine = load_engine(checkpoints / "mistral", CONFIG)
    sound = start_one(engine, 200, outputs=16)
    run_mixed(engine, [sound], max_tokens=16)
    harmed = start_one(engine, 200, outputs=16)
    run_mixed(engine, [harmed], max_tokens=1)
    engine.arena.data[harmed.table[2]] = float("nan")
    run_mixed(engine, [harmed], max_tokens=16)
    assert harmed.output == sound.output


def test_a_prefix_computed_by_another_sequence_serves_this_one(checkpoints: Path) -> None:
    engine = load_engine(checkpoints / "llama", CONFIG)
    cold = start_one(engine, 120, outputs=8)
    run_mixed(engine, [cold], max_tokens=8)
    (warm,) = start_sequences(engine, [cold.tokens[:120]], max_tokens=8, seed=9)
    warm.table[:4] = cold.table[:4]
    warm.fed = 64
    assert not set(warm.table[4:]) & set(cold.table)
    run_mixed(engine, [warm], max_tokens=8)
    assert warm.output == cold.output


def test_sharded_weights_give_the_same_logits(checkpoints: Path, tmp_path: Path) -> None:
    single = checkpoints / "llama"
    sharded = write_checkpoint(tmp_path / "sharded", "llama")
    Reference(single).model.save_pretrained(sharded, max_shard_size="200KB")
    (sharded / "model.safetensors").unlink()
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    answers = []
    for directory in (single, sharded):
        engine = load_engine(directory, CONFIG)
        sequence = start_one(engine, 40, outputs=4)
        run_mixed(engine, [sequence], max_tokens=4)
        answers.append(torch.stack(sequence.logits))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-5)  # alignment differs


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_is_as_close_to_fp32_as_transformers_is(checkpoints: Path, family: str) -> None:
    prompts = [random_prompt(n) for n in (40, 70, 100, 150)]
    exact, rounded = (
        torch.cat([Reference(checkpoints / family, dtype).generate(p, 1).logits for p in prompts])
        for dtype in (torch.float32, torch.bfloat16)
    )
    engine = load_engine(checkpoints / family, EngineConfig(kv_memory_mb=4, dtype="bfloat16"))
    assert engine.arena.data.dtype == torch.bfloat16
    poison(engine)
    sequences = start_sequences(engine, prompts, max_tokens=1)
    run_mixed(engine, sequences, max_tokens=1)
    ours = torch.cat([s.logits[0][None] for s in sequences])
    assert (ours - exact).norm() < 1.5 * (rounded - exact).norm()


def test_sampled_text_is_the_same_alone_and_in_a_batch(checkpoints: Path) -> None:
    engine = load_engine(checkpoints / "qwen3", CONFIG)
    params = SamplingParams(max_tokens=24, seed=7, temperature=1.0, top_p=0.95, top_k=100)
    prompts = [random_prompt(n) for n in (30, 100, 7, 64)]
    together = start_sequences(engine, prompts, max_tokens=24, params=params)
    run_mixed(engine, together, max_tokens=24)
    for i, prompt in enumerate(prompts):
        (alone,) = start_sequences(engine, [prompt], max_tokens=24, params=params, seed=i + 1)
        run_mixed(engine, [alone], max_tokens=24, chunk=512)
        assert alone.output == together[i].output


def test_choices_of_one_request_differ(checkpoints: Path) -> None:
    engine = load_engine(checkpoints / "qwen3", CONFIG)
    params = SamplingParams(max_tokens=16, seed=7)
    choices = start_sequences(engine, [random_prompt(30)] * 2, max_tokens=16, params=params)
    for number, choice in enumerate(choices):
        choice.sequence_id = replace(choices[0].sequence_id, choice=number)
    run_mixed(engine, choices, max_tokens=16)
    assert choices[0].output != choices[1].output


def test_only_sampling_entries_are_answered_and_logits_only_on_request(checkpoints: Path) -> None:
    engine = load_engine(checkpoints / "llama", CONFIG)
    sequences = start_sequences(engine, [random_prompt(100), random_prompt(20)], max_tokens=1)
    sequences[1].params = replace(GREEDY, return_logits=False)
    chunk, whole = engine.step([s.next_step(64) for s in sequences])
    assert chunk is None
    assert isinstance(whole, Sampled)
    assert whole.logits == b""
    assert engine.step([sequences[0].next_step(64)]) == [None]
    assert engine.step([]) == []


def bad_entries(engine: HfEngine) -> dict[str, tuple[Driven, type[BatonError]]]:
    def one(num_tokens: int = 20) -> Driven:
        return start_one(engine, num_tokens, outputs=1)

    outside, negative, short, backwards, long = one(), one(), one(), one(), one()
    outside.tokens[3] = VOCAB_SIZE
    negative.tokens[3] = -1
    short.table = short.table[:1]
    backwards.fed = 20
    long.tokens = random_prompt(CONTEXT_TOKENS + 1)
    long.table *= 200
    return {
        "token outside of the vocabulary": (outside, InvalidRequest),
        "negative token": (negative, InvalidRequest),
        "too few blocks": (short, InternalError),
        "nothing to feed": (backwards, InternalError),
        "longer than the context": (long, InvalidRequest),
    }


def test_a_bad_entry_fails_alone(checkpoints: Path) -> None:
    engine = load_engine(checkpoints / "llama", CONFIG)
    good = start_one(engine, 30, outputs=1, seed=3)
    (wanted,) = engine.step([good.next_step(64)])
    for what, (bad, error) in bad_entries(engine).items():
        answers = engine.step([bad.next_step(5000), good.next_step(64), bad.next_step(5000)])
        assert [type(a) for a in answers] == [error, Sampled, error], what
        assert isinstance(wanted, Sampled)
        assert isinstance(answers[1], Sampled)
        assert answers[1].token == wanted.token


def test_nan_in_one_sequence_stays_there(checkpoints: Path) -> None:
    engine = load_engine(checkpoints / "mistral", CONFIG)
    prompts = [random_prompt(n, seed=2) for n in (90, 40, 100)]
    sound = start_sequences(engine, prompts, max_tokens=4)
    run_mixed(engine, sound, max_tokens=4)
    again = start_sequences(engine, prompts, max_tokens=4)
    run_mixed(engine, again, max_tokens=1)
    engine.arena.data[again[1].table[1]] = float("nan")
    answers = engine.step([s.next_step(64) for s in again])
    assert [type(a) for a in answers] == [Sampled, InternalError, Sampled]
    for index in (0, 2):
        answer = answers[index]
        assert isinstance(answer, Sampled)
        assert answer.token == sound[index].output[1]


def test_missing_parameters_are_not_replaced_by_random_ones(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "grown", "llama")
    config = directory / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    )
    with pytest.raises(ConfigError, match="lack 9 parameters of the model, the first being"):
        load_engine(directory, CONFIG)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "other", "llama")
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 64', '"hidden_size": 96'))
    with pytest.raises(ConfigError, match="cannot load the weights"):
        load_engine(directory, CONFIG)


def test_an_arena_that_holds_no_block_is_refused(checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match="holds no KV block"):
        load_engine(checkpoints / "llama", EngineConfig(kv_memory_mb=0.001))
