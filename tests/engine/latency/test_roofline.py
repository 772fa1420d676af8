"""The roofline: where it must agree with arithmetic, and in what order it must put things."""

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from engine.latency.base import StepShape
from engine.latency.devices import find_device
from engine.latency.roofline import Efficiency, RooflineLatency
from engine.latency.shapes import ModelShape, find_shape, published_shape, read_shape

IDEAL = Efficiency(compute=1, attention_compute=1, memory=1, link=1, launch_s=0, hop_s=0, step_s=0)
H100 = find_device("h100")
LLAMA = find_shape("llama-3-8b")


def model(tp: int = 1, shape: ModelShape = LLAMA) -> RooflineLatency:
    return RooflineLatency(model=shape, device=H100, tp=tp, efficiency=IDEAL)


def test_one_decode_takes_the_time_to_read_the_weights_and_its_kv() -> None:
    embedding = LLAMA.vocab * LLAMA.hidden * 2
    moved = LLAMA.model_bytes - embedding + 4096 * LLAMA.kv_bytes_per_token
    expected_s = moved / H100.memory_bytes_per_s
    assert model().step_s(StepShape([], 1, 4096)) == pytest.approx(expected_s, rel=2e-3)


def test_a_long_prompt_takes_the_time_of_its_arithmetic() -> None:
    tokens = 8192
    layers = LLAMA.parameters - 2 * LLAMA.vocab * LLAMA.hidden
    flops = 2 * layers * tokens + 2 * LLAMA.layers * LLAMA.heads * LLAMA.head_dim * tokens**2
    step_s = model().step_s(StepShape([(0, tokens)]))
    assert step_s == pytest.approx(flops / H100.flops_per_s, rel=3e-3)


def test_chunks_of_a_prompt_have_the_attention_of_the_whole() -> None:
    whole_s = model().step_s(StepShape([(0, 8192)]))
    chunks_s = sum(model().step_s(StepShape([(i, i + 2048)])) for i in range(0, 8192, 2048))
    assert chunks_s == pytest.approx(whole_s, rel=0.01)


@pytest.mark.parametrize(
    "shape", [StepShape([(0, 4096)]), StepShape([], 64, 64 * 2048), StepShape([(0, 512)], 8, 8192)]
)
def test_two_ranks_take_over_half_the_time_of_one(shape: StepShape) -> None:
    one_s, two_s = model().step_s(shape), model(tp=2).step_s(shape)
    assert one_s / 2 < two_s < one_s


def test_a_run_is_the_sum_of_its_steps() -> None:
    each = [model(2).step_s(StepShape([], 7, 900 + 7 * k)) for k in range(40)]
    assert model(2).decode_run_s(7, 900, 40) == pytest.approx(sum(each))


def test_a_mixed_step_takes_less_than_its_two_phases_apart() -> None:
    apart_s = model().step_s(StepShape([(0, 64)])) + model().step_s(StepShape([], 32, 32_000))
    assert model().step_s(StepShape([(0, 64)], 32, 32_000)) < 0.7 * apart_s


def test_a_small_batch_reads_few_of_the_experts() -> None:
    experts = ModelShape(
        name="moe",
        layers=32,
        hidden=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=1792,
        vocab=1000,
        experts=64,
        top_k=8,
    )
    read = [model(shape=experts).step_s(StepShape([], batch, batch)) for batch in (1, 256)]
    assert read[0] < read[1] / 4
    all_s = (experts.model_bytes - 1000 * 4096 * 2) / H100.memory_bytes_per_s
    assert read[1] == pytest.approx(all_s, rel=0.05)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="28 attention heads"):
        model(8, find_shape("qwen2.5-7b"))


def test_a_shape_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    fields = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert find_shape(str(tmp_path)).parameters == LLAMA.parameters


def test_a_config_without_a_needed_field_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    with pytest.raises(ConfigError, match="has no num_attention_heads"):
        read_shape(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"kv_lora_rank": 512}, "latent_attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    ],
)
def test_a_model_without_plain_keys_and_values_is_refused(
    other: dict[str, object], named: str, tmp_path: Path
) -> None:
    fields = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(fields | other))
    with pytest.raises(ConfigError, match=named):
        read_shape(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("nvidia/Llama-3.3-70B-Instruct-FP8", "llama-3.3-70b"),
        ("bloom-176b", "bloom-176b"),
        ("my-llama-3-8b", None),
    ],
)
def test_a_published_name_is_told_from_another(name: str, known: str | None) -> None:
    shape = published_shape(name)
    assert (shape.name if shape is not None else None) == known


def test_an_unknown_model_or_device_names_the_known() -> None:
    with pytest.raises(ConfigError, match="llama-3-8b"):
        find_shape("nowhere")
    with pytest.raises(ConfigError, match="h100"):
        find_device("tpu")
