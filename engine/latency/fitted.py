"""The fitted model: prefill a + b*n + c*n^2, decode a + b*B + c*sum(ctx) (DistServe, OSDI'24)."""

from dataclasses import dataclass
from typing import Self

from engine.config import TimedConfig
from engine.latency.base import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLatency:
    """Implements engine.latency.base.LatencyModel. All coefficients are seconds per unit."""

    prefill_base_s: float
    prefill_token_s: float
    prefill_token2_s: float
    decode_base_s: float
    decode_sequence_s: float
    decode_context_token_s: float

    @classmethod
    def of(cls, timed: TimedConfig) -> Self:
        """The timed engine's."""
        return cls(
            prefill_base_s=timed.prefill_base_ms / 1e3,
            prefill_token_s=timed.prefill_per_token_ms / 1e3,
            prefill_token2_s=timed.prefill_per_token2_ms / 1e3,
            decode_base_s=timed.decode_base_ms / 1e3,
            decode_sequence_s=timed.decode_per_sequence_ms / 1e3,
            decode_context_token_s=timed.decode_per_context_token_ms / 1e3,
        )

    def step_s(self, shape: StepShape) -> float:
        total_s = 0.0
        tokens = sum(end - start for start, end in shape.prefill)
        if tokens:
            total_s += self.prefill_base_s
            total_s += tokens * (self.prefill_token_s + tokens * self.prefill_token2_s)
        if shape.decode_sequences:
            total_s += self.decode_base_s + shape.decode_sequences * self.decode_sequence_s
            total_s += shape.decode_context_tokens * self.decode_context_token_s
        return total_s

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        fixed_s = self.decode_base_s + sequences * self.decode_sequence_s
        grown = sequences * (steps - 1) / 2
        return steps * (fixed_s + (context_tokens + grown) * self.decode_context_token_s)
