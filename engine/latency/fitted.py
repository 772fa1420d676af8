"""A latency model of a few coefficients, as fitted by DistServe (OSDI'24) and xLLM (2510.14686).

    prefill = a + b * tokens + c * tokens^2 + h * pairs
    decode  = a + b * sequences + c * sum of contexts

`tokens` are all new tokens of the step. `pairs` are the (new token, itself or an earlier one) pairs
that attention looks at: n * history + n^2 / 2 for a chunk of n. A curve c * n^2 measured on whole
prompts says h = 2c for chunks that have a history; c itself charges a step's chunks together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from engine.config import TimedConfig
from engine.latency.base import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCurve:
    """Seconds per step, per token, per token squared and per pair of tokens."""

    base_s: float = 0.0
    per_token_s: float = 0.0
    per_token2_s: float = 0.0
    per_pair_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCurve:
    """Seconds per step, per sequence and per token of context, from `from_sequences` on."""

    base_s: float = 0.0
    per_sequence_s: float = 0.0
    per_context_token_s: float = 0.0
    from_sequences: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedLatency:
    """Implements LatencyModel.

    `decode` is ordered by `from_sequences`, as batches of different sizes may have been fitted
    apart. A step that does both saves `mixed_saves_s`: it reads the weights once.
    """

    prefill: PrefillCurve
    decode: tuple[DecodeCurve, ...]
    mixed_saves_s: float = 0.0

    @classmethod
    def of(cls, timed: TimedConfig) -> Self:
        """The model that the settings of the timed engine describe."""
        return cls(
            prefill=PrefillCurve(
                base_s=timed.prefill_base_ms / 1e3,
                per_token_s=timed.prefill_per_token_ms / 1e3,
                per_token2_s=timed.prefill_per_token2_ms / 1e3,
                per_pair_s=timed.prefill_per_pair_ms / 1e3,
            ),
            decode=(
                DecodeCurve(
                    base_s=timed.decode_base_ms / 1e3,
                    per_sequence_s=timed.decode_per_sequence_ms / 1e3,
                    per_context_token_s=timed.decode_per_context_token_ms / 1e3,
                ),
            ),
        )

    def step_s(self, shape: StepShape) -> float:
        total_s = 0.0
        if shape.prefill:
            total_s += self._prefill_s(shape.prefill)
        if shape.decode_sequences:
            curve = self._curve(shape.decode_sequences)
            total_s += curve.base_s + curve.per_sequence_s * shape.decode_sequences
            total_s += curve.per_context_token_s * shape.decode_context_tokens
            if shape.prefill:
                total_s -= self.mixed_saves_s
        return total_s

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        curve = self._curve(sequences)
        contexts = steps * context_tokens + sequences * (steps * (steps - 1) // 2)
        return (
            steps * (curve.base_s + curve.per_sequence_s * sequences)
            + curve.per_context_token_s * contexts
        )

    def _prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        curve, tokens, pairs = self.prefill, 0, 0.0
        for start, end in chunks:
            tokens += end - start
            pairs += (end - start) * (start + end) / 2
        total_s = curve.base_s + curve.per_token_s * tokens
        return total_s + curve.per_token2_s * tokens * tokens + curve.per_pair_s * pairs

    def _curve(self, sequences: int) -> DecodeCurve:
        curves = self.decode
        chosen = curves[0]
        if len(curves) > 1:
            for curve in curves:
                if sequences >= curve.from_sequences:
                    chosen = curve
        return chosen
