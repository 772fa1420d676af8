"""Prefixes that workers are about to hold: those of prompts submitted and not yet computed.

Workers compute prompts in order and look again into their cache before each, so whoever queues
behind a prompt finds the prefix they share. Without this, prompts that come faster than their
prefix is computed, a burst with a new system prompt or the next turn of an impatient agent, would
scatter, and every worker would compute it. SGLang's gateway counts a prompt as cached where it was
sent for the same reason; here that ends with the first token, when the worker's own word is there.

A prompt is noted in steps of 512 tokens. Each chain of notes is closed under prefix, so lookups
bisect, as in the index.
"""

from collections.abc import Sequence
from itertools import islice

from core.ids import BlockHash, WorkerId

_STEP_TOKENS = 512
_MAX_STEPS = 256
"""A prompt's first 131,072 tokens: what one note costs is bounded."""


def steps_of(hashes: Sequence[BlockHash], block_size: int) -> Sequence[BlockHash]:
    """The hashes of a prompt at which it is noted."""
    step = blocks_per_step(block_size)
    return hashes[step - 1 : step * _MAX_STEPS : step]


def blocks_per_step(block_size: int) -> int:
    return max(1, _STEP_TOKENS // block_size)


class Coming:
    """Who will hold what. Every `add` is taken back by one `drop` of the same."""

    def __init__(self) -> None:
        self._counts: dict[BlockHash, dict[WorkerId, int]] = {}

    def add(self, worker: WorkerId, steps: Sequence[BlockHash]) -> None:
        """A prompt was submitted there."""
        for step in steps:
            workers = self._counts.setdefault(step, {})
            workers[worker] = workers.get(worker, 0) + 1

    def drop(self, worker: WorkerId, steps: Sequence[BlockHash]) -> None:
        """It is computed, or was given up."""
        for step in steps:
            workers = self._counts[step]
            workers[worker] -= 1
            if not workers[worker]:
                del workers[worker]
            if not workers:
                del self._counts[step]

    def noted(self, steps: Sequence[BlockHash]) -> Sequence[BlockHash]:
        """Of these the first ones, as many as any worker will hold: all that need be looked at."""
        return steps[: self._depth(steps, None)]

    def longest(self, steps: Sequence[BlockHash], limit: int) -> list[WorkerId]:
        """Up to `limit` of those who will hold the longest prefix of these that anybody will."""
        depth = self._depth(steps, None)
        return list(islice(self._counts[steps[depth - 1]], limit)) if depth else []

    def steps_at(self, worker: WorkerId, steps: Sequence[BlockHash]) -> int:
        """How many of these, from the first on, that worker will hold."""
        return self._depth(steps, worker) if self._counts else 0

    def _depth(self, steps: Sequence[BlockHash], worker: WorkerId | None) -> int:
        counts, low, high = self._counts, 0, len(steps)
        if not high or not _noted(counts.get(steps[0]), worker):
            return 0
        while low < high:
            middle = (low + high) >> 1
            if _noted(counts.get(steps[middle]), worker):
                low = middle + 1
            else:
                high = middle
        return low


def _noted(workers: dict[WorkerId, int] | None, worker: WorkerId | None) -> bool:
    return workers is not None and (worker is None or worker in workers)
