"""What a checkpoint directory says of its model, without loading a weight.

Router, worker and `baton config check` all call `read_checkpoint`, so a bad directory fails the
same way, with one sentence, before a port opens; and `model_id` is the same on every side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from core.errors import ConfigError
from core.ids import ModelId
from core.kv import KvDtype, KvLayout
from core.sampling import SamplingDefaults
from engine.architecture import check_architecture, check_model_type
from engine.config import EngineConfig
from engine.weights import WeightFiles, check_directory, check_tokenizer, check_weights, read_json

KV_FORMAT_VERSION = 1
"""Raised when the same tokens would put other bytes into a block."""

CONFIG_FAULTS = (ValueError, TypeError, KeyError, AttributeError, OSError)
"""What transformers' config classes raise for wrong values, besides their own error."""

Device = Literal["cpu", "cuda"]

_SAFETENSORS_DTYPES: dict[str, KvDtype] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """A checkpoint that can be served, under one engine's settings.

    `model_id` depends on the KV dtype, which `dtype: auto` takes from the device: sides that must
    agree need the same explicit dtype or the same kind of device.
    """

    directory: Path
    model_id: ModelId
    model_type: str
    device: Device
    layout: KvLayout
    context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    sampling: SamplingDefaults


def read_checkpoint(directory: Path, config: EngineConfig) -> CheckpointInfo:
    """Check the directory and describe its model; ConfigError with one sentence otherwise."""
    check_directory(directory)
    model_type = check_model_type(read_json(directory / "config.json").get("model_type"))
    hf_config = read_config(directory)
    shape = check_architecture(hf_config)
    weights = check_weights(directory)
    tokenizer = check_tokenizer(directory)
    device = choose_device(config)
    dtype = _choose_dtype(config, hf_config, weights, device)
    generation = _generation_config(directory)
    return CheckpointInfo(
        directory=directory,
        model_id=_model_id(directory, model_type, weights, tokenizer, dtype),
        model_type=model_type,
        device=device,
        layout=KvLayout(
            block_size=config.block_size,
            num_kv_heads=shape.num_kv_heads,
            num_layers=shape.num_layers,
            head_dim=shape.head_dim,
            dtype=dtype,
        ),
        context_tokens=shape.context_tokens,
        vocab_size=shape.vocab_size,
        eos_token_ids=_eos_token_ids(generation, hf_config, tokenizer),
        sampling=_sampling_defaults(generation, directory),
    )


def read_config(directory: Path) -> PretrainedConfig:
    """transformers' view of config.json; never runs code that comes with a checkpoint."""
    try:
        return AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (*CONFIG_FAULTS, StrictDataclassError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"transformers cannot read {directory / 'config.json'} ({detail}); "
            "compare it with the model's original"
        ) from error


def choose_device(config: EngineConfig) -> Device:
    """`auto` prefers CUDA; asking for what is not there is a ConfigError."""
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError(
            "engine.device is cuda, but torch finds no CUDA device; "
            "set it to cpu or auto, or install a CUDA build of torch and a driver"
        )
    return "cuda" if available and config.device != "cpu" else "cpu"


def _choose_dtype(
    config: EngineConfig, hf_config: PretrainedConfig, weights: WeightFiles, device: Device
) -> KvDtype:
    if config.dtype != "auto":
        return config.dtype
    if device == "cpu":
        return "float32"
    if hf_config.dtype is not None:
        name = str(hf_config.dtype).removeprefix("torch.")
    else:
        name = _SAFETENSORS_DTYPES.get(weights.dtype, weights.dtype)
    if name not in _SAFETENSORS_DTYPES.values():
        raise ConfigError(
            f"the checkpoint is in {name}, which the engine does not compute in; "
            "set engine.dtype to bfloat16 or float32"
        )
    return cast(KvDtype, name)


def _model_id(
    directory: Path, model_type: str, weights: WeightFiles, tokenizer: Path, dtype: KvDtype
) -> ModelId:
    digest = blake2b(digest_size=16)
    for part in (
        f"kv-format {KV_FORMAT_VERSION} {dtype}".encode(),
        (directory / "config.json").read_bytes(),
        weights.digest.encode(),
        tokenizer.read_bytes(),
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    return ModelId(f"{model_type}-{digest.hexdigest()}")


def _generation_config(directory: Path) -> Mapping[str, object]:
    path = directory / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def _eos_token_ids(
    generation: Mapping[str, object], hf_config: PretrainedConfig, tokenizer: Path
) -> frozenset[int]:
    """Of generation_config or else config, and the tokenizer's own: a chat model's end of turn
    stands in either.
    """
    found = generation.get("eos_token_id")
    if found is None:
        found = getattr(hf_config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(f"eos_token_id {found!r} is neither a token id nor a list of them")
    return frozenset(cast(list[int], ids)) | _tokenizer_eos(tokenizer)


def _tokenizer_eos(tokenizer: Path) -> frozenset[int]:
    settings = tokenizer.with_name("tokenizer_config.json")
    eos = read_json(settings).get("eos_token") if settings.is_file() else None
    content = eos.get("content") if isinstance(eos, dict) else eos
    added = read_json(tokenizer).get("added_tokens")
    return frozenset(
        token["id"]
        for token in (added if isinstance(added, list) else [])
        if isinstance(token, dict) and token.get("content") == content
    )


def _sampling_defaults(generation: Mapping[str, object], directory: Path) -> SamplingDefaults:
    def number(name: str, low: float, high: float) -> float | None:
        value = generation.get(name)
        if value is None:
            return None
        usable = isinstance(value, int | float) and not isinstance(value, bool)
        if not usable or not low <= cast(float, value) <= high:
            raise ConfigError(
                f"{directory / 'generation_config.json'} gives {name} {value!r}, outside of "
                f"{low:g} to {high:g}; correct or remove it"
            )
        return float(cast(float, value))

    top_k = number("top_k", -1, 1e9)
    return SamplingDefaults(
        temperature=number("temperature", 0, 100),
        top_p=number("top_p", 0, 1),
        top_k=None if top_k is None else max(0, int(top_k)),
    )
