"""Checksums of blocks, to prove on request that what arrived is what was announced.

CRC-32 finds any damage a wire or a wrong copy does by accident. It is made from the bytes as they
lie, so it compares arenas of equal layout only. Both run on a thread: a block of a real model takes
a millisecond.
"""

import asyncio
import zlib
from collections.abc import Sequence
from typing import Literal

import torch

from core.ids import BlockId
from engine.arena import Arena

VerifyMode = Literal["off", "sample", "all"]

SAMPLE_EVERY = 16


def pick_blocks(mode: VerifyMode, count: int, seed: int) -> range:
    """Indexes of the blocks to verify out of `count`; `sample` starts where `seed` says."""
    if mode == "off" or not count:
        return range(0)
    if mode == "all":
        return range(count)
    return range(seed % min(SAMPLE_EVERY, count), count, SAMPLE_EVERY)


async def checksum_blocks(arena: Arena, block_ids: Sequence[BlockId]) -> tuple[int, ...]:
    """CRC-32 of each block's bytes."""
    return await asyncio.to_thread(_checksum_blocks, arena, tuple(block_ids))


def _checksum_blocks(arena: Arena, block_ids: tuple[BlockId, ...]) -> tuple[int, ...]:
    blocks = arena.data.view(arena.num_blocks, -1).view(torch.uint8)
    return tuple(zlib.crc32(blocks[block_id].cpu().numpy().data) for block_id in block_ids)
