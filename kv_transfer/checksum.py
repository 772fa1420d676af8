"""Checksums of blocks, to prove on request that what arrived is what was announced.

CRC-32 finds any damage a wire or a wrong copy does by accident. There is one for each KV head of a
block, made from its bytes in one order of axes, so that arenas that lie differently, or hold other
heads, can be compared. Both run on a thread: a block of a real model takes a millisecond.
"""

import asyncio
import zlib
from collections.abc import Sequence
from typing import Literal

import torch

from core.ids import BlockId
from core.kv import Axis
from engine.arena import Arena

VerifyMode = Literal["off", "sample", "all"]

SAMPLE_EVERY = 16
_BYTES_AT_ONCE = 64 << 20
"""Between two looks at whether somebody still waits."""


def pick_blocks(mode: VerifyMode, count: int, seed: int) -> range:
    """Indexes of the blocks to verify out of `count`; `sample` starts where `seed` says."""
    if mode == "off" or not count:
        return range(0)
    if mode == "all":
        return range(count)
    return range(seed % min(SAMPLE_EVERY, count), count, SAMPLE_EVERY)


async def checksum_blocks(arena: Arena, block_ids: Sequence[BlockId]) -> tuple[int, ...]:
    """CRC-32 of each KV head's part of each block, head by head for the first block, and so on."""
    sums: list[int] = []
    at_once = max(1, _BYTES_AT_ONCE // arena.layout.block_bytes)
    for start in range(0, len(block_ids), at_once):
        part = tuple(block_ids[start : start + at_once])
        sums += await asyncio.to_thread(_checksum_blocks, arena, part)
    return tuple(sums)


def checksums_of(
    sums: Sequence[int], heads: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...]:
    """Those of the heads `wanted`, out of the `sums` of blocks that have `heads`."""
    places = [heads.index(head) for head in wanted]
    return tuple(
        sums[start + place] for start in range(0, len(sums), len(heads)) for place in places
    )


def _checksum_blocks(arena: Arena, block_ids: tuple[BlockId, ...]) -> list[int]:
    blocks = _in_common_order(arena)
    return [
        zlib.crc32(head)
        for block_id in block_ids
        for head in blocks[block_id].contiguous().cpu().numpy()
    ]


def _in_common_order(arena: Arena) -> torch.Tensor:
    """A view `[block, head, layer, side, token, bytes of a cell]`, whatever the arena's order."""
    layout = arena.layout
    strides = layout.strides_bytes(arena.num_blocks)
    within: tuple[Axis, ...] = ("head", "layer", "side", "token")
    return torch.as_strided(
        arena.data.view(-1).view(torch.uint8),
        (arena.num_blocks, *(layout.extent(axis) for axis in within), layout.cell_bytes),
        (strides["block"], *(strides[axis] for axis in within), 1),
    )
