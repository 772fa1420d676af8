"""The seam between whoever plans steps and whoever knows how long they take. Pure."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class StepShape(NamedTuple):
    """What one step feeds. A chunk is (start, end): positions [start, end) of one prompt.

    `decode_context_tokens` is the sum over the decoding sequences of the positions each attends
    to, the one it feeds included.
    """

    prefill: Sequence[tuple[int, int]]
    decode_sequences: int = 0
    decode_context_tokens: int = 0


class LatencyModel(Protocol):
    """Seconds of steps on one worker."""

    def step_s(self, shape: StepShape) -> float: ...

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        """`steps` decode steps in a row, of which the first attends to `context_tokens`; each
        sequence grows by one token per step. Never less for more steps.
        """
        ...
