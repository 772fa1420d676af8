"""Which architectures are served, told from config.json alone."""

import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from engine.architecture import AttentionShape, check_architecture, check_model_type
from engine.checkpoint import read_config


def check(directory: Path, model_type: str, **settings: object) -> AttentionShape:
    """What the engine says to a config with this type's defaults and these settings."""
    content = {"model_type": check_model_type(model_type), **settings}
    (directory / "config.json").write_text(json.dumps(content))
    return check_architecture(read_config(directory))


@pytest.mark.parametrize(
    ("model_type", "shape"),
    [
        ("llama", (32, 32, 128, 2048)),
        ("qwen2", (32, 32, 128, 32768)),
        ("qwen3_moe", (24, 4, 64, 32768)),
        ("gemma2", (26, 4, 256, 8192)),
        ("gemma3_text", (26, 4, 256, 131072)),
        ("mistral", (32, 8, 128, 131072)),
        ("gpt2", (12, 12, 64, 1024)),
        ("olmo2", (32, 32, 128, 2048)),
        ("smollm3", (36, 4, 128, 32768)),
    ],
)
def test_plain_decoders_are_served(
    tmp_path: Path, model_type: str, shape: tuple[int, int, int, int]
) -> None:
    found = check(tmp_path, model_type)
    assert (found.num_layers, found.num_kv_heads, found.head_dim, found.context_tokens) == shape


@pytest.mark.parametrize(
    ("model_type", "sentence"),
    [
        ("qwen3_next", r"layer 0 \(linear_attention\)"),
        ("qwen3_5_text", r"layer 0 \(linear_attention\)"),
        ("jamba", r"layer 0 \(linear_attention\)"),
        ("falcon_h1", r"layer 0 \(hybrid\)"),
        ("zamba2", r"layer 0 \(linear_attention\)"),
        ("nemotron_h", r"layer 0 \(linear_attention\)"),
        ("llama4_text", r"layer 0 \(chunked_attention\)"),
        ("deepseek_v3", r"layer 0 \(latent attention\)"),
        ("minicpm3", r"layer 0 \(latent attention\)"),
        ("gpt_oss", r"layer 0 \(attention sinks\)"),
        ("gemma3n_text", r"layer 20 \(shared KV\)"),
        ("gemma4_text", r"layer 5 \(head_dim 512\) differs from layer 0, which has 256"),
        ("mamba", r"layer 0 \(linear_attention\)"),
        ("rwkv", "no usable"),
        ("bloom", "no usable max_position_embeddings"),
        ("bart", "attends to an encoder"),
        ("gemma3", r"is made of parts \(.*as multi-modal models are"),
        ("mllama", r"is made of parts \(.*as multi-modal models are"),
    ],
)
def test_other_layers_are_refused_by_name(tmp_path: Path, model_type: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check(tmp_path, model_type)


def test_the_layer_named_is_the_first_odd_one(tmp_path: Path) -> None:
    types = ["full_attention", "sliding_attention", "full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match=r"^layer 3 \(linear_attention\) keeps no plain keys"):
        check(tmp_path, "qwen3", num_hidden_layers=4, layer_types=types)


def test_layers_with_different_head_counts_are_refused(tmp_path: Path) -> None:
    counts = [48, 48, 32, 48]
    with pytest.raises(ConfigError, match=r"layer 2 \(num_attention_heads_per_layer 32\) differs"):
        check(tmp_path, "laguna", num_hidden_layers=4, num_attention_heads_per_layer=counts)


def test_layers_that_differ_in_their_mlp_only_are_served(tmp_path: Path) -> None:
    per_layer = {"1": {"intermediate_size": 64, "head_dim": 128}}
    shape = check(tmp_path, "llama", num_hidden_layers=3, head_dim=128, per_layer_config=per_layer)
    assert (shape.num_layers, shape.head_dim) == (3, 128)
    per_layer["1"]["head_dim"] = 64
    with pytest.raises(ConfigError, match=r"layer 1 \(head_dim 64\) differs from layer 0"):
        check(tmp_path, "llama", num_hidden_layers=3, head_dim=128, per_layer_config=per_layer)


@pytest.mark.parametrize("model_type", ["qwen9", None, 5, ["llama"]])
def test_an_unknown_model_type_is_refused(model_type: object) -> None:
    with pytest.raises(ConfigError, match="is not known to the installed transformers; upgrade"):
        check_model_type(model_type)


@pytest.mark.parametrize("model_type", ["t5", "vit", "clip"])
def test_a_model_that_is_no_causal_decoder_is_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match="is not a decoder-only language model"):
        check_model_type(model_type)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("bert", "BertForMaskedLM"), ("llama", "LlamaForSequenceClassification")],
)
def test_a_head_that_generates_nothing_is_refused(
    tmp_path: Path, model_type: str, name: str
) -> None:
    with pytest.raises(ConfigError, match=f"names the architecture {name}, which generates no"):
        check(tmp_path, model_type, architectures=[name])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "InternLM3ForCausalLM"])
def test_a_causal_head_is_served(tmp_path: Path, name: str) -> None:
    check(tmp_path, "llama", architectures=[name])


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_batch_is_refused(tmp_path: Path, rope_type: str) -> None:
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0}
    if rope_type == "longrope":
        rope |= {"long_factor": [1.0] * 64, "short_factor": [1.0] * 64}
    with pytest.raises(ConfigError, match=f"rope type '{rope_type}' chooses its frequencies"):
        check(tmp_path, "llama", rope_parameters=rope)


def test_rope_of_one_layer_type_is_checked_too(tmp_path: Path) -> None:
    fixed = {"rope_type": "default", "rope_theta": 10000.0}
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    rope = {"sliding_attention": fixed, "full_attention": dynamic}
    with pytest.raises(ConfigError, match="rope type 'dynamic'"):
        check(tmp_path, "gemma3_text", rope_parameters=rope)


@pytest.mark.parametrize(
    ("rope", "limit", "context_tokens"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            40960,
            131072,
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            131072,
            131072,
        ),
        ({"rope_type": "yarn", "factor": 4.0}, 32768, 131072),
        ({"rope_type": "linear", "factor": 4.0}, 16384, 16384),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            131072,
            131072,
        ),
    ],
)
def test_the_context_follows_the_rope(
    tmp_path: Path, rope: dict[str, object], limit: int, context_tokens: int
) -> None:
    shape = check(tmp_path, "qwen3", max_position_embeddings=limit, rope_scaling=rope)
    assert shape.context_tokens == context_tokens


def test_rope_scaling_in_the_old_spelling_is_understood(tmp_path: Path) -> None:
    rope = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    settings = {"max_position_embeddings": 32768, "rope_scaling": rope, "rope_theta": 1e6}
    assert check(tmp_path, "qwen2", **settings).context_tokens == 131072


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is quantized, which is not served yet"):
        check(tmp_path, "llama", quantization_config={"quant_method": "awq", "bits": 4})


def test_a_bidirectional_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attends in both directions"):
        check(tmp_path, "gemma3_text", use_bidirectional_attention=True)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="32 attention heads over 5 key/value heads"):
        check(tmp_path, "llama", num_key_value_heads=5)


@pytest.mark.parametrize("value", [0, -1, "many", None])
def test_a_nonsensical_size_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        check(tmp_path, "llama", vocab_size=value)
