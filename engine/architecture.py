"""Whether the engine can run an architecture, told from its config alone.

Served is: a decoder of text whose every layer is plain causal K/V attention of one shape, full or
with a sliding window, with positions that do not depend on the batch. Anything else is refused
here, naming the layer, before weights are touched. What a config does not show, self_check.py
finds out by running the model once.
"""

from dataclasses import dataclass

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from core.errors import ConfigError
from engine.latency.shapes import LAYER_TYPES

ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
"""Frequencies are constants. "dynamic" and "longrope" choose them by the longest sequence of the
batch, so a request's text would depend on its neighbours."""

SHAPE_NAMES = (
    "num_key_value_heads",
    "num_attention_heads",
    "head_dim",
    "hidden_size",
    "kv_lora_rank",
)
"""Fields that all layers of a heterogeneous config must agree in."""

SINK_MODELS = frozenset({"gpt_oss", "flint", "granite_swa", "granitemoe_swa", "mimo_v2_flash"})
"""Models with attention sinks that do not show in their config."""

REMEDY = "choose a model whose layers are all plain K/V attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The one shape of all attention layers, and the positions the model knows."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    context_tokens: int
    vocab_size: int


def check_model_type(model_type: object) -> str:
    """The model type when transformers has a causal language model for it, or ConfigError."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            f"model_type {model_type!r} in config.json is not known to the installed transformers; "
            "upgrade transformers, or choose a model that needs no code of its own"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model_type {model_type!r} is not a decoder-only language model; "
            "choose one that transformers loads as AutoModelForCausalLM"
        )
    return model_type


def check_architecture(config: PretrainedConfig) -> AttentionShape:
    """The shape of the model's attention, or ConfigError naming what stands against it."""
    _check_kind(config)
    _check_layers(config)
    _check_rope(config)
    layer = layer_config(config, 0)
    heads = _positive(layer, "num_attention_heads")
    shape = AttentionShape(
        num_layers=_positive(config, "num_hidden_layers"),
        num_kv_heads=_kv_heads(layer, heads),
        head_dim=_head_dim(layer, heads),
        context_tokens=context_tokens(config),
        vocab_size=_positive(config, "vocab_size"),
    )
    if heads % shape.num_kv_heads:
        raise ConfigError(
            f"config.json gives {heads} attention heads over {shape.num_kv_heads} key/value heads, "
            "which do not divide them; correct config.json"
        )
    return shape


def context_tokens(config: PretrainedConfig) -> int:
    """Positions the model knows. Yarn stretches the original ones by its factor, unless
    max_position_embeddings says so already; the other rope types leave that number as it is."""
    limit = _positive(config, "max_position_embeddings")
    for rope in _rope_parameters(config):
        if rope.get("rope_type") == "yarn":
            original = rope.get("original_max_position_embeddings") or limit
            limit = max(limit, int(float(str(original)) * float(str(rope.get("factor", 1.0)))))
    return limit


def layer_config(config: PretrainedConfig, layer: int) -> PretrainedConfig:
    """The fields as one layer has them: a heterogeneous config refuses to answer for all."""
    return config.per_layer_config[layer] if config.is_heterogeneous else config


def _check_kind(config: PretrainedConfig) -> None:
    model_type = config.model_type
    if config.sub_configs:
        parts = ", ".join(sorted(config.sub_configs))
        raise ConfigError(
            f"model_type {model_type!r} is made of parts ({parts}), as multi-modal models are; "
            "choose a text-only model"
        )
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise ConfigError(
            f"model_type {model_type!r} attends to an encoder; choose a decoder-only model"
        )
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    architectures = list(getattr(config, "architectures", None) or [wanted])
    if wanted not in architectures and not any(
        "CausalLM" in name or "LMHead" in name for name in architectures
    ):
        raise ConfigError(
            f"config.json names the architecture {architectures[0]}, which generates no text; "
            f"choose a checkpoint saved as {wanted}"
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise ConfigError("the model attends in both directions; choose a causal one")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            "the checkpoint is quantized, which is not served yet; choose its bf16 or fp32 version"
        )


def _check_layers(config: PretrainedConfig) -> None:
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    for layer, layer_type in enumerate(types):
        if layer_type not in LAYER_TYPES:
            raise _layer_error(layer, str(layer_type), "keeps no plain keys and values")
    _check_same_shape(config)
    first = layer_config(config, 0)
    if getattr(first, "kv_lora_rank", None) is not None:
        raise _layer_error(0, "latent attention", "keeps compressed keys and values")
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared:
        own = _positive(config, "num_hidden_layers") - int(shared)
        raise _layer_error(own, "shared KV", "reuses the keys and values of an earlier layer")
    _check_head_counts(first)
    for layer in getattr(config, "cross_attention_layers", None) or ():
        raise _layer_error(int(layer), "cross attention", "attends to another input")
    if config.model_type in SINK_MODELS:
        raise _layer_error(0, "attention sinks", "adds a learned score to every softmax")
    if getattr(config, "alibi", False):
        raise _layer_error(0, "alibi", "adds a bias by distance to its scores")


def _check_same_shape(config: PretrainedConfig) -> None:
    """Every layer must be like the first; only heterogeneous configs can differ."""
    if not config.is_heterogeneous:
        return
    first = layer_config(config, 0)
    for layer in range(_positive(config, "num_hidden_layers")):
        for name in SHAPE_NAMES:
            value = getattr(layer_config(config, layer), name, None)
            if value != (wanted := getattr(first, name, None)):
                raise _layer_error(
                    layer, f"{name} {value}", f"differs from layer 0, which has {wanted}"
                )


def _check_head_counts(config: PretrainedConfig) -> None:
    """Some configs give heads as a list, one count per layer."""
    for name in ("num_key_value_heads", "num_attention_heads", "num_attention_heads_per_layer"):
        counts = getattr(config, name, None)
        if not isinstance(counts, list | tuple):
            continue
        for layer, count in enumerate(counts):
            if count != counts[0]:
                raise _layer_error(
                    layer, f"{name} {count}", f"differs from layer 0, which has {counts[0]}"
                )


def _check_rope(config: PretrainedConfig) -> None:
    for rope in _rope_parameters(config):
        rope_type = rope.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ConfigError(
                f"rope type {rope_type!r} chooses its frequencies by the length of the longest "
                "sequence in the batch, so requests would change each other's text; "
                "choose a model with fixed ones (default, linear, yarn or llama3)"
            )


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, object]]:
    """The one set of rope parameters, or one per layer type."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return []
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _kv_heads(config: PretrainedConfig, heads: int) -> int:
    for name in ("num_key_value_heads", "num_kv_heads"):
        if getattr(config, name, None) is not None:
            return _positive(config, name)
    return heads


def _head_dim(config: PretrainedConfig, heads: int) -> int:
    if getattr(config, "head_dim", None) is not None:
        return _positive(config, "head_dim")
    return _positive(config, "hidden_size") // heads


def _positive(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"config.json of model_type {config.model_type!r} has no usable {name} ({value!r}); "
            f"{REMEDY}"
        )
    return value


def _layer_error(layer: int, kind: str, reason: str) -> ConfigError:
    return ConfigError(f"layer {layer} ({kind}) {reason}, which is not served yet; {REMEDY}")
