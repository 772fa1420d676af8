"""Steps that do both: answers decode, and part of a prompt is computed beside them.

    seconds = a + tokens * b + pairs * c + sequences * d + context * e

A decode worker bounds such a step by how much of the prompt it takes, and a router predicts how
much that will be: both ask `chunk_within`.
"""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

from core.fit import CostFit, pairs_of

STEP_TOKENS = 512
"""What a step takes, of a worker that does not say."""
LEAST_CHUNK_TOKENS = 64
"""However little room there is, a prompt moves on by so many a step."""
_ENOUGH_STEPS = 2
_EARLY_STEPS = 16
_LEARN_EVERY_S = 1.0


def chunk_within(room_s: float, start: int, token_s: float, pair_s: float, most: int) -> int:
    """The longest chunk from position `start` on that adds at most `room_s` to a step, of `most`
    tokens; at least LEAST_CHUNK_TOKENS.

    n * token_s + (n * start + n^2 / 2) * pair_s = room_s, solved for n.
    """
    least = min(LEAST_CHUNK_TOKENS, most)
    if room_s <= 0:
        return least
    linear_s = token_s + start * pair_s
    divisor = linear_s + sqrt(linear_s * linear_s + 2 * pair_s * room_s)
    return max(least, int(min(most, 2 * room_s / divisor))) if divisor > 0 else most


class StepWork(NamedTuple):
    """What steps computed of prompts. `pairs` are of a token with itself or one before it."""

    steps: int = 0
    tokens: int = 0
    pairs: float = 0.0

    def plus(self, chunks: Sequence[tuple[int, int]], steps: int = 1) -> "StepWork":
        """And of so many more, with positions [start, end) of each chunk."""
        tokens = sum(end - start for start, end in chunks)
        pairs = sum(pairs_of(start, end) for start, end in chunks)
        return StepWork(self.steps + steps, self.tokens + tokens, self.pairs + pairs)

    def since(self, before: "StepWork") -> "StepWork":
        """Of this total, what was not in that one."""
        steps, tokens = self.steps - before.steps, self.tokens - before.tokens
        return StepWork(steps, tokens, self.pairs - before.pairs)


NO_WORK = StepWork()


def work_alone(start: int, end: int, step_tokens: int = STEP_TOKENS) -> StepWork:
    """Of positions [start, end) of a prompt that has its steps for itself."""
    tokens = max(0, end - start)
    return StepWork(-(-tokens // step_tokens), tokens, pairs_of(start, end) if tokens else 0.0)


class StepBudget:
    """How much of a prompt a worker computes beside answers that decode: as much as keeps the step
    within `step_s`, by what such steps have taken there. None bounds nothing. One observation per
    second is learned from, as each costs tens of microseconds; but the first few at once.
    """

    _PRIOR = (6.12e-3, 1.424e-5, 1.5e-9, 9.1e-6, 4.21e-8)  # Llama-3-8B on an H100; the shape lasts

    def __init__(self, step_s: float | None) -> None:
        self.step_s = step_s
        self._fit = CostFit(self._PRIOR, weight=0.1)
        self._coefficients: tuple[float, ...] = self._PRIOR
        self._learned_at_s = -_LEARN_EVERY_S

    def chunk_tokens(self, start: int, sequences: int, context_tokens: int, most: int) -> int:
        """Of a prompt that is computed up to `start`, of `most` tokens, beside so many sequences
        whose contexts are `context_tokens` together.
        """
        if self.step_s is None or not sequences or self._fit.observed < _ENOUGH_STEPS:
            return most
        step_s, token_s, pair_s, sequence_s, context_s = self._coefficients
        decode_s = step_s + sequences * sequence_s + context_tokens * context_s
        return chunk_within(self.step_s - decode_s, start, token_s, pair_s, most)

    def learns(self, now_s: float) -> bool:
        """Whether a step that ends now is learned from."""
        is_early = now_s - self._learned_at_s < _LEARN_EVERY_S
        return self.step_s is not None and not (is_early and self._fit.observed >= _EARLY_STEPS)

    def saw(
        self,
        chunks: Sequence[tuple[int, int]],
        sequences: int,
        context_tokens: int,
        seconds: float,
        now_s: float,
    ) -> None:
        """A step that computed positions [start, end) of each chunk, and decoded."""
        if not self.learns(now_s):
            return
        self._learned_at_s = now_s
        work = NO_WORK.plus(chunks)
        self._fit.add((*work, sequences, context_tokens), seconds)
        self._coefficients = self._fit.coefficients
