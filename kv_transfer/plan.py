"""From block lists to descriptors: which bytes to read from where to where.

Pure. Equal layouts only: block for block, neighbours coalesced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from core.ids import BlockId


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One contiguous run: byte offsets into the two arenas, and its length."""

    remote_offset_bytes: int
    local_offset_bytes: int
    nbytes: int


def plan_read(
    remote: Sequence[BlockId], local: Sequence[BlockId], block_bytes: int
) -> list[Descriptor]:
    """Read block `remote[i]` into block `local[i]`; runs contiguous on both sides become one."""
    if len(remote) != len(local):
        raise ValueError(f"{len(remote)} remote blocks for {len(local)} local ones")
    runs: list[Descriptor] = []
    start = 0
    for i in range(1, len(remote) + 1):
        joined = i < len(remote) and remote[i] == remote[i - 1] + 1 and local[i] == local[i - 1] + 1
        if not joined:
            runs.append(
                Descriptor(
                    remote[start] * block_bytes,
                    local[start] * block_bytes,
                    (i - start) * block_bytes,
                )
            )
            start = i
    return runs
