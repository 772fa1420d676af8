"""Proves at load that the engine computes what the model's own code would.

A config does not show everything an architecture does with its attention. So the loaded model runs
a few tokens twice: whole, with transformers' attention, and packed in chunks over an arena, with
ours, watching every call. A model that passes extra inputs to its attention, keeps state outside
of it, or gives other logits is refused, rather than answering with wrong text.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, PreTrainedModel

from core.errors import ConfigError
from core.ids import BlockId, RequestId, SequenceId
from core.kv import KvLayout
from engine.architecture import REMEDY, layer_config
from engine.arena import TORCH_DTYPE, Arena
from engine.attention import PAGED, paged_attention, run_packed
from engine.packing import PackedStep
from engine.types import SeqStep

WATCHED = "baton_watched"
PROBE_TOKENS = 24
PROBE_SPLIT = 17
HARMLESS = frozenset(
    {
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "packed",
        "position_ids",
        "scaling",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)
"""Inputs of an attention call that ours understands, or that do not change its result."""

MAX_ERROR = {torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}
"""Root mean square difference of the logits, relative to their spread. In half precision a router
of experts may flip on rounding alone, so only a gross difference counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What one layer handed to its attention."""

    layer: int | None
    key_shape: tuple[int, ...]
    value_shape: tuple[int, ...]
    window: int | None
    causal: bool
    extras: tuple[str, ...]


def check_model(model: PreTrainedModel, layout: KvLayout) -> None:
    """Raise ConfigError unless the model runs exactly over the paged arena.

    The model must use the attention PAGED, and does so again afterwards.
    """
    vocab_size = int(model.config.vocab_size)
    tokens = [(13 + 7919 * i) % vocab_size for i in range(PROBE_TOKENS)]
    calls: list[_Call] = []
    packed = _packed_logits(model, layout, tokens, calls)
    _check_calls(model, layout, calls)
    _check_counts(layout, calls)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        whole = model(
            torch.tensor([tokens], device=model.device), use_cache=False, return_dict=True
        ).logits[0]
    finally:
        model.set_attn_implementation(PAGED)
    error = (packed.float() - whole.float()).square().mean().sqrt() / whole.float().std()
    limit = MAX_ERROR[TORCH_DTYPE[layout.dtype]]
    if not float(error) <= limit:
        raise ConfigError(
            f"model_type {model.config.model_type!r} gives other logits over the paged KV cache "
            f"(relative error {float(error):.2g}, at most {limit:g}); {REMEDY}"
        )


def _packed_logits(
    model: PreTrainedModel, layout: KvLayout, tokens: list[int], calls: list[_Call]
) -> torch.Tensor:
    """Logits of all tokens, fed in two chunks through the watched attention."""

    def watched(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        calls.append(_observe(module, key, value, attention_mask, kwargs))
        return paged_attention(module, query, key, value, attention_mask, **kwargs)  # type: ignore[arg-type]

    num_blocks = layout.num_blocks(PROBE_TOKENS)
    arena = Arena(layout, num_blocks, str(model.device))
    table = [BlockId(block) for block in reversed(range(num_blocks))]
    AttentionInterface.register(WATCHED, watched)
    model.set_attn_implementation(WATCHED)
    logits: list[torch.Tensor] = []
    try:
        for start, end in ((0, PROBE_SPLIT), (PROBE_SPLIT, PROBE_TOKENS)):
            entry = SeqStep(
                sequence_id=SequenceId(RequestId("self-check")),
                tokens=tokens,
                start=start,
                end=end,
                block_table=table,
                sample=None,
            )
            step = PackedStep([entry], arena)
            logits.append(run_packed(model, step, torch.arange(end - start, device=model.device)))
    except (TypeError, RuntimeError, IndexError, AttributeError) as error:
        _check_calls(model, layout, calls)
        raise ConfigError(
            f"model_type {model.config.model_type!r} does not run over a paged KV cache "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); {REMEDY}"
        ) from error
    finally:
        model.set_attn_implementation(PAGED)
    return torch.cat(logits)


def _observe(
    module: torch.nn.Module,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, object],
) -> _Call:
    extras = {name for name, given in kwargs.items() if given is not None} - HARMLESS
    if attention_mask is not None:
        extras.add("attention_mask")
    window = kwargs.get("sliding_window")
    layer = getattr(module, "layer_idx", None)
    return _Call(
        layer=layer if isinstance(layer, int) else None,
        key_shape=tuple(key.shape),
        value_shape=tuple(value.shape),
        window=window if isinstance(window, int) else None,
        causal=bool(getattr(module, "is_causal", True)),
        extras=tuple(sorted(extras)),
    )


def _check_calls(model: PreTrainedModel, layout: KvLayout, calls: list[_Call]) -> None:
    """Every call must be plain causal attention of the one shape, in a layer of the decoder."""
    for call in calls:
        if call.layer is None or call.layer >= layout.num_layers:
            raise _refusal(layout.num_layers, "is an attention outside of the decoder's layers")
        if call.extras:
            more = ", ".join(call.extras)
            raise _refusal(call.layer, f"gives its attention more inputs ({more})")
        if not call.causal:
            raise _refusal(call.layer, "attends in both directions")
        fed = call.key_shape[2] if len(call.key_shape) == 4 else 0
        wanted_shape = (1, layout.num_kv_heads, fed, layout.head_dim)
        if call.key_shape != wanted_shape or call.value_shape != wanted_shape:
            raise _refusal(
                call.layer,
                f"has keys {list(call.key_shape)} and values {list(call.value_shape)} instead of "
                f"{layout.num_kv_heads} heads of {layout.head_dim}",
            )
        if call.window != (wanted := _window(model, call.layer)):
            raise _refusal(call.layer, f"attends to a window of {call.window} instead of {wanted}")


def _check_counts(layout: KvLayout, calls: list[_Call]) -> None:
    """Every layer must have called once for each of the two chunks."""
    for layer in range(layout.num_layers):
        count = sum(call.layer == layer for call in calls)
        if count != 2:
            raise _refusal(layer, f"calls its attention {count} times in two steps")


def _refusal(layer: int, what: str) -> ConfigError:
    return ConfigError(f"layer {layer} {what}, which is not served yet; {REMEDY}")


def _window(model: PreTrainedModel, layer: int) -> int | None:
    """The window the config gives a layer."""
    config = layer_config(model.config, layer)
    types = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    if types is not None and types[layer] != "sliding_attention":
        return None
    return window
