"""The seam of latency models: a step's shape in, its time out. Pure.

The timed engine sleeps for it, the simulator jumps over it, the planner searches with it.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class StepShape(NamedTuple):
    """What one engine step computes."""

    prefill: Sequence[tuple[int, int]]
    """(start, end) positions of each chunk; the KV of positions below `start` is there already."""
    decode_sequences: int = 0
    decode_context_tokens: int = 0
    """Of all decoding sequences together, with the token each feeds in this step."""


class LatencyModel(Protocol):
    """Seconds of steps on one worker, all its tensor parallel ranks together."""

    def step_s(self, shape: StepShape) -> float:
        """One step; 0 for an empty one."""
        ...

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        """`steps` steps that only decode, the first of `context_tokens`; each sequence grows by
        one token per step. Equals the sum of the steps, up to rounding, in time that does not
        grow with `steps`.
        """
        ...


def steps_within(
    model: LatencyModel, sequences: int, context_tokens: int, seconds: float, most: int
) -> int:
    """How many steps of a decode run are complete after `seconds`, at most `most`."""
    if most <= 0 or model.decode_run_s(sequences, context_tokens, 1) > seconds:
        return 0
    low, high = 1, 2
    while high <= most and model.decode_run_s(sequences, context_tokens, high) <= seconds:
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if model.decode_run_s(sequences, context_tokens, middle) <= seconds:
            low = middle
        else:
            high = middle
    return low
