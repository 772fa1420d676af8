"""A latency model that interpolates measured points."""

from dataclasses import dataclass

from engine.latency.base import StepShape
from engine.latency.curve import Curve, Grid

NOTHING = Curve((0.0,), (0.0,))
NO_GRID = Grid((0.0,), (NOTHING,))


@dataclass(frozen=True, slots=True, kw_only=True)
class TableLatency:
    """Implements LatencyModel. Values are seconds of all layers together.

        step = dense(all new tokens) + per_sequence(chunks and decodes)
             + sum over chunks prefill(tokens, history) + decode(sequences, mean context)

    Profiles by kernel fill all four, so that a mixed step reads the weights once. Profiles of whole
    steps leave `dense` empty: a mixed step is then both steps, one after the other.
    """

    prefill: Grid
    decode: Grid
    dense: Curve = NOTHING
    per_sequence: Curve = NOTHING
    mixed_saves_s: float = 0.0
    """What a step with both phases takes less than their sum."""

    def step_s(self, shape: StepShape) -> float:
        tokens, total_s, sequences = shape.decode_sequences, 0.0, shape.decode_sequences
        for start, end in shape.prefill:
            total_s += self.prefill.at(end - start, start)
            tokens += end - start
        if sequences:
            total_s += self.decode.at(sequences, shape.decode_context_tokens / sequences)
            if shape.prefill:
                total_s -= self.mixed_saves_s
        if not tokens:
            return 0.0
        sequences += len(shape.prefill)
        return total_s + self.dense.at(tokens) + self.per_sequence.at(sequences)

    def decode_run_s(self, sequences: int, context_tokens: int, steps: int) -> float:
        if steps <= 0:
            return 0.0
        fixed_s = self.dense.at(sequences) + self.per_sequence.at(sequences)
        grown_s = self.decode.run(sequences, context_tokens / sequences, steps)
        return steps * fixed_s + grown_s
