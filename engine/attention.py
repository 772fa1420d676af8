"""The attention of every layer, over the paged arena: our function behind transformers' models.

transformers calls it in each layer with this layer's rotated queries and keys; the packed step
comes along as the keyword `packed`. It writes K and V of the fed positions into the arena, then
each group of the step attends to its whole context, read through the block tables.

    arena   [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], seen as
    tiles   [num_blocks * num_kv_heads * num_layers * 2, block_size * head_dim]: reads gather these
    rows    [... * block_size, head_dim]: writes go to these

Layer l lies 2 * l tiles after layer 0, so one index serves all layers.
"""

from typing import cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from engine.packing import Group, GroupRead, PackedStep

PAGED = "baton_paged"
"""The name under which transformers finds this attention."""


def register_attention() -> None:
    """Make the name known to transformers; repeating it changes nothing."""
    AttentionInterface.register(PAGED, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """`query` is `[1, heads, T, head_dim]`, `key` and `value` `[1, kv_heads, T, head_dim]`.

    Answers `[1, T, heads, head_dim]`. `attention_mask` is always None: transformers makes no mask
    for an attention it does not know, and the packed step has its own.
    """
    layer = cast(int, module.layer_idx)
    _write(packed, layer, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    for group, read in zip(packed.groups, packed.reads(sliding_window), strict=True):
        keys, values = _gather(packed, layer, len(group.entries), read)
        rows = query[0, :, group.row : group.row_end]
        if group.queries == 1 or softcap is not None:
            output = _attend_folded(rows, keys, values, group, read, scale=scale, softcap=softcap)
        else:
            output = _attend_chunk(rows, keys, values, read, scale)
        outputs.append(output)
    packed_output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return packed_output[None], None


def run_packed(model: PreTrainedModel, packed: PackedStep, rows: torch.Tensor) -> torch.Tensor:
    """One forward pass of a model that uses PAGED; logits `[len(rows), vocab]` of these rows."""
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        use_cache=False,
        return_dict=True,
        logits_to_keep=rows,
        packed=packed,
    )
    logits: torch.Tensor = output.logits[0]
    return logits


def _write(packed: PackedStep, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    layout = packed.arena.layout
    rows = packed.arena.data.view(-1, layout.head_dim)
    for kind, states in enumerate((key, value)):
        offset = (2 * layer + kind) * layout.block_size
        source = states[0].transpose(0, 1).reshape(-1, layout.head_dim)
        rows[offset:].index_copy_(0, packed.write_rows, source)


def _gather(
    packed: PackedStep, layer: int, sequences: int, read: GroupRead
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[sequences, kv_heads, keys, head_dim]`."""
    layout = packed.arena.layout
    tiles = packed.arena.data.view(-1, layout.block_size * layout.head_dim)
    gathered = tiles[2 * layer :].index_select(0, read.tiles)
    states = gathered.view(2, sequences, layout.num_kv_heads, -1, layout.head_dim)
    states = states[:, :, :, read.key_first : read.key_end]
    return states[0], states[1]


def _attend_chunk(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    read: GroupRead,
    scale: float,
) -> torch.Tensor:
    """One prefill chunk. `rows` is `[heads, queries, head_dim]`; answers `[queries, heads, ..]`."""
    # The CPU kernel shares a KV head among its query heads; on CUDA only the slow one does so with
    # a mask, and expanded heads let the fused one run.
    shared = rows.device.type == "cpu"
    if not shared:
        groups = rows.shape[0] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    output = scaled_dot_product_attention(
        rows[None],
        keys,
        values,
        attn_mask=read.mask,
        is_causal=read.causal,
        scale=scale,
        enable_gqa=shared and rows.shape[0] != keys.shape[1],
    )
    return output[0].transpose(0, 1)


def _attend_folded(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: Group,
    read: GroupRead,
    *,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """The query heads that share a KV head, as its query rows: no expanded keys, no loop.

    `rows` is `[heads, sequences * queries, head_dim]`; answers `[sequences * queries, heads, ..]`.
    """
    sequences, kv_heads, _, head_dim = keys.shape
    heads, num_rows, _ = rows.shape
    shape = (sequences, kv_heads, heads // kv_heads, group.queries)
    queries = rows.view(kv_heads, shape[2], sequences, group.queries, head_dim)
    folded = queries.permute(2, 0, 1, 3, 4).reshape(sequences, kv_heads, -1, head_dim)
    if softcap is None:
        output = scaled_dot_product_attention(
            folded, keys, values, attn_mask=read.mask, scale=scale
        )
    else:
        scores = torch.matmul(folded * (scale / softcap), keys.transpose(-1, -2))
        scores = scores.tanh_().mul_(softcap).view(*shape, -1)
        mask = _explicit_mask(read, group.queries, scores)
        if mask is not None:
            scores += mask[:, :, None]
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        output = torch.matmul(weights.view(*folded.shape[:-1], -1), values)
    unfolded = output.view(*shape, head_dim).permute(0, 3, 1, 2, 4)
    return unfolded.reshape(num_rows, heads, head_dim)


def _explicit_mask(read: GroupRead, queries: int, scores: torch.Tensor) -> torch.Tensor | None:
    """The mask, spelled out where the fused kernel would be told `causal` instead."""
    if not read.causal:
        return read.mask
    hidden = torch.full((queries, queries), float("-inf"), dtype=scores.dtype, device=scores.device)
    return hidden.triu_(1)[None, None]
