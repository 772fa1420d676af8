"""Caches of blocks that forget what was used longest ago, without workers or time."""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

from core.ids import BlockHash

Asked = tuple[int, Sequence[BlockHash]]
"""A prompt: its tokens, and the chained hashes of its full blocks."""


class Lru:
    """Of a prompt's blocks the last are forgotten first, so what is held is closed under prefix.
    `capacity` in blocks; None is endless.
    """

    def __init__(self, capacity: int | None) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[BlockHash, None] = OrderedDict()

    def held(self, hashes: Sequence[BlockHash]) -> int:
        """How many of these, from the first on."""
        return sum(1 for _ in takewhile(self._blocks.__contains__, hashes))

    def add(
        self, hashes: Sequence[BlockHash]
    ) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """A prompt was used: those that are new, and those forgotten for them."""
        new = tuple(block for block in hashes if block not in self._blocks)
        for block in reversed(hashes):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        excess = 0 if self._capacity is None else max(0, len(self._blocks) - self._capacity)
        return new, tuple(self._blocks.popitem(last=False)[0] for _ in range(excess))

    def ask(self, hashes: Sequence[BlockHash]) -> int:
        """How many blocks, from the first on, it held; now it holds all, as far as they fit."""
        held = self.held(hashes)
        self.add(hashes)
        return held


def hit_share(
    prompts: Sequence[Asked],
    capacity: int | None,
    *,
    block_tokens: int = 512,
    skip: int = 0,
    places: Sequence[int] | None = None,
) -> float:
    """Share of the prompts' tokens that were cached, of all but the first `skip` prompts. With
    `places` each prompt goes to the cache of that number, each of `capacity` blocks.
    """
    caches = [Lru(capacity) for _ in range(max(places, default=0) + 1 if places else 1)]
    hit = asked = 0
    for i, (tokens, hashes) in enumerate(prompts):
        held = caches[places[i] if places else 0].ask(hashes)
        if i >= skip:
            hit += min(held * block_tokens, tokens - 1)
            asked += tokens
    return hit / asked
