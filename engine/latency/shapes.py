"""The shape of a model, as far as it decides how much is computed and read."""

import json
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of equal layers. `experts` 0 is a dense MLP; else each token takes `top_k` of them,
    each `ffn` wide. `gated` MLPs have three matrices, others two. 16-bit weights and KV by default.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int = 0
    top_k: int = 0
    gated: bool = True
    weight_bytes: float = 2.0
    kv_bytes: float = 2.0

    @property
    def kv_bytes_per_token(self) -> float:
        """KV of one token, all layers and ranks."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes

    @property
    def parameters(self) -> float:
        """Weights of all layers, the embedding and the output."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = (3 if self.gated else 2) * self.hidden * self.ffn * max(1, self.experts)
        return self.layers * (attention + mlp) + 2 * self.vocab * self.hidden

    @property
    def model_bytes(self) -> float:
        """Memory of the weights, all ranks together."""
        return self.parameters * self.weight_bytes


def _dense(
    name: str, shape: tuple[int, int, int, int, int, int, int], *, gated: bool = True
) -> ModelShape:
    layers, hidden, heads, kv_heads, head_dim, ffn, vocab = shape
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        gated=gated,
    )


SHAPES = {
    shape.name: shape
    for shape in (
        _dense("llama-3-8b", (32, 4096, 32, 8, 128, 14336, 128256)),
        _dense("llama-3-70b", (80, 8192, 64, 8, 128, 28672, 128256)),
        _dense("llama-3.1-8b", (32, 4096, 32, 8, 128, 14336, 128256)),
        _dense("llama-3.3-70b", (80, 8192, 64, 8, 128, 28672, 128256)),
        _dense("llama2-70b", (80, 8192, 64, 8, 128, 28672, 32000)),
        _dense("qwen2.5-7b", (28, 3584, 28, 4, 128, 18944, 152064)),
        _dense("qwen2.5-14b", (48, 5120, 40, 8, 128, 13824, 152064)),
        _dense("qwen2.5-32b", (64, 5120, 40, 8, 128, 27648, 152064)),
        _dense("opt-13b", (40, 5120, 40, 40, 128, 20480, 50272), gated=False),
        _dense("opt-66b", (64, 9216, 72, 72, 128, 36864, 50272), gated=False),
        _dense("bloom-176b", (70, 14336, 112, 112, 128, 57344, 250880), gated=False),
    )
}
"""Known by name, from their published config.json."""

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Layers that keep plain keys and values, as config.json names them."""


def find_shape(model: str) -> ModelShape:
    """Of a known name, or of the checkpoint folder `model`. Raises ConfigError."""
    if model.lower() in SHAPES:
        return SHAPES[model.lower()]
    file = Path(model) / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"{model!r} is neither a folder with a config.json nor one of: {', '.join(SHAPES)}"
        )
    return read_shape(file)


def published_shape(model: str) -> ModelShape | None:
    """Of a name such as nvidia/Llama-3.1-8B-Instruct-FP8, where it is known."""
    name = model.rpartition("/")[2].lower()
    return SHAPES.get(name.removesuffix("-fp8").removesuffix("-instruct"))


def read_shape(file: Path) -> ModelShape:
    """From a Hugging Face config.json. Raises ConfigError naming the field that is missing, or what
    the model keeps in place of keys and values.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is no config.json: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{file} is no config.json: it holds no object")

    _check_plain(file, fields)

    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = fields.get(name)
            if isinstance(value, int) and value > 0:
                return value
        if default is None:
            raise ConfigError(f"{file} has no {names[0]}")
        return default

    hidden = number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")
    experts = number("num_local_experts", "num_experts", "n_routed_experts", default=0)
    ffn = number("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden)
    return ModelShape(
        name=file.parent.name,
        layers=number("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        ffn=number("moe_intermediate_size", default=ffn) if experts else ffn,
        vocab=number("vocab_size"),
        experts=experts,
        top_k=number("num_experts_per_tok", default=2) if experts else 0,
        gated=fields.get("model_type") not in {"opt", "gpt2", "gpt_neox", "bloom", "falcon"},
    )


def _check_plain(file: Path, fields: dict[str, object]) -> None:
    """The engine refuses such models too; here their KV would have another size than is computed
    from their heads.
    """
    kind = "latent_attention" if fields.get("kv_lora_rank") is not None else None
    layers = fields.get("layer_types")
    if kind is None and isinstance(layers, list):
        kind = next((str(layer) for layer in layers if layer not in LAYER_TYPES), None)
    if kind is not None:
        raise ConfigError(
            f"{file}: layers of {kind} keep no plain keys and values, so the size of the KV is not"
            " known; choose a model whose layers are all plain K/V attention"
        )
