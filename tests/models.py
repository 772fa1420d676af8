"""Small random checkpoints of real architectures, for tests of the engine and of the whole stack.

Plain random weights make a model that repeats one token whatever it read, so a test of exactness
could not fail. These are scaled so that attention picks single tokens from all over the context and
layers outweigh the residual stream: a greedy answer keeps changing, and changes with its context.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging as transformers_logging

VOCAB_SIZE = 512
CONTEXT_TOKENS = 4096
SLIDING_WINDOW = 64
SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
EOS_TOKEN_ID = SPECIALS.index("<|eos|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture, and the gains that make its random weights talk.

    A gain multiplies the standard deviation 1/sqrt(fan_in), or a norm's weight. `attend` scales
    queries and keys: attention scores spread by its square.
    """

    config: Callable[..., PretrainedConfig]
    settings: dict[str, Any]
    attend: float = 1.8
    layer: float = 1.0
    embed: float = 1.0
    head: float = 3.0
    norm_offset: float = 0.0
    """Gemma's norms multiply by 1 + weight."""
    after: float = 1.0
    """Gain of the norms after attention and MLP, which only Gemma has."""


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "pad_token_id": SPECIALS.index("<|pad|>"),
    "bos_token_id": SPECIALS.index("<|bos|>"),
    "eos_token_id": EOS_TOKEN_ID,
    "tie_word_embeddings": False,
}
_GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "tie_word_embeddings": True,
}
_GEMMA_GAINS = {"embed": 0.4, "norm_offset": 1.0, "after": 20.0}

FAMILIES: dict[str, Family] = {
    "llama": Family(config=LlamaConfig, settings={}),
    "qwen3": Family(config=Qwen3Config, settings={"head_dim": 32}),
    "mistral": Family(config=MistralConfig, settings={"sliding_window": SLIDING_WINDOW}),
    "gemma2": Family(config=Gemma2Config, settings=_GEMMA, **_GEMMA_GAINS),
    "gemma3": Family(config=Gemma3TextConfig, settings=_GEMMA, **_GEMMA_GAINS),
    "mixtral": Family(config=MixtralConfig, settings={"num_local_experts": 4}),
    "qwen3_moe": Family(
        config=Qwen3MoeConfig,
        settings={
            "head_dim": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
        },
    ),
}


def write_checkpoint(directory: Path, family: str, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a complete checkpoint (fp32, some MB) into `directory` and return it.

    `overrides` are fields of the family's config. The same arguments give the same weights.
    """
    recipe = FAMILIES[family]
    config = recipe.config(**(_COMMON | recipe.settings | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _set_weights(model, recipe, torch.Generator().manual_seed(seed))
    directory.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(directory)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> Path:
    """A byte-level tokenizer of VOCAB_SIZE ids with a chat template: all an engine without a model
    needs, and every id decodes to something."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIALS, *letters]
    frequent = "etaoinshrdlucmfwygpb"
    pairs = [(a, b) for a in frequent for b in frequent][: VOCAB_SIZE - len(tokens)]
    tokens += [a + b for a, b in pairs]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    directory.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
    ).save_pretrained(directory)
    return directory


def _set_weights(model: torch.nn.Module, recipe: Family, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                _set_norm(name, weight, recipe)
                continue
            if "embed_tokens" in name:
                gain, fan_in = recipe.embed, 1
            elif "lm_head" in name:
                gain, fan_in = recipe.head, weight.shape[-1]
            elif "q_proj" in name or "k_proj" in name:
                gain, fan_in = recipe.attend, weight.shape[-1]
            else:
                gain, fan_in = recipe.layer, weight.shape[-1]
            weight.normal_(0.0, gain / fan_in**0.5, generator=generator)
            if "embed_tokens" in name or "lm_head" in name:
                # A middling logit whatever the context: no special token is ever the answer.
                weight[: len(SPECIALS)] = 0.0


def _set_norm(name: str, weight: torch.Tensor, recipe: Family) -> None:
    gain = 1.0
    if "q_norm" in name or "k_norm" in name:
        gain = recipe.attend
    elif recipe.after != 1.0 and "post_" in name:
        gain = recipe.after
    weight.fill_(gain - recipe.norm_offset)
