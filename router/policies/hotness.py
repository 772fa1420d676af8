"""The hotness tree: how much of a prompt is its key, so that a hot prefix gets many homes.

DualMap (ICLR'26, arXiv 2602.06502). Prompts are counted per node of the tree of their prefixes, a
level per 512 tokens, in a window of 30 s. A key is two levels deep at first. A node that more than
2/n of all prompts pass, n workers, is split: the key goes one level deeper, and what was one key
becomes as many as follow. Below 1/n it is one key again.
"""

from collections import deque

from core.ids import BlockHash
from router.policies.base import PrefillQuery

_LEVEL_TOKENS = 512
_START_LEVEL = 2
_LEVELS = 16
_WINDOW_S = 30.0
_WINDOW_PROMPTS = 16_384
"""Bounds the memory; past it the window is shorter."""


class HotnessTree:
    """`saw` counts a prompt, `key` tells the key of one."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, tuple[BlockHash, ...]]] = deque()
        self._counts: dict[BlockHash, int] = {}
        self._split: set[BlockHash] = set()

    def key(self, query: PrefillQuery) -> BlockHash | None:
        """The hash of the prompt's prefix that decides its homes; None without a full block."""
        if not query.hashes:
            return None
        nodes = _nodes(query)
        share = len(self._window) / max(1, len(query.pool))
        for level in range(_START_LEVEL - 1, len(nodes)):
            node = nodes[level]
            limit = share if node in self._split else 2 * share
            if self._counts.get(node, 0) <= limit:
                return node
        return nodes[-1] if len(nodes) >= _START_LEVEL else query.hashes[-1]

    def saw(self, query: PrefillQuery) -> None:
        """The prompt was placed now."""
        while self._window and (
            self._window[0][0] < query.now_s - _WINDOW_S or len(self._window) >= _WINDOW_PROMPTS
        ):
            self._forget(self._window.popleft()[1])
        nodes = _nodes(query)
        self._window.append((query.now_s, nodes))
        share = len(self._window) / max(1, len(query.pool))
        for node in nodes:
            count = self._counts[node] = self._counts.get(node, 0) + 1
            if count > 2 * share:
                self._split.add(node)
            elif count < share:
                self._split.discard(node)

    def _forget(self, nodes: tuple[BlockHash, ...]) -> None:
        for node in nodes:
            left = self._counts[node] - 1
            if left:
                self._counts[node] = left
            else:
                del self._counts[node]
                self._split.discard(node)


def _nodes(query: PrefillQuery) -> tuple[BlockHash, ...]:
    """The hashes at the ends of the prompt's levels."""
    step = max(1, _LEVEL_TOKENS // query.block_size)
    return tuple(query.hashes[step - 1 : step * _LEVELS : step])
