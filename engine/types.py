"""The seam between whoever schedules (event loop) and whoever computes (engine thread)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from core.errors import BatonError
from core.ids import BlockId, ModelId, SequenceId
from core.kv import KvLayout
from core.sampling import SamplingParams

if TYPE_CHECKING:  # imports torch, which those who only plan steps do without
    from engine.arena import Arena


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqStep:
    """One sequence's part of a step: positions [start, end) are fed.

        tokens  |---- KV in the arena ----|---- fed now ----|-- not yet --|
                0                       start              end       len(tokens)

    `block_table` covers at least `end` positions. With `sample` set, `end == len(tokens)` and the
    step draws the token that follows, at absolute output position `output_position`.
    `tokens` belongs to the caller, who does not change it while the step runs.
    """

    sequence_id: SequenceId
    tokens: Sequence[int]
    start: int
    end: int
    block_table: Sequence[BlockId]
    sample: SamplingParams | None
    output_position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A drawn token; `logits` (fp32 little endian, vocab_size) only when asked for."""

    token: int
    logits: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What others must know of a loaded engine."""

    model_id: ModelId
    layout: KvLayout
    num_blocks: int
    context_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    device: str
    """Its name: engines of one model on equal devices are equally fast."""


class Engine(Protocol):
    """Owns the model and the arena.

    `step` is called from one thread at a time, the engine thread, never re-entered. Entry i of its
    answer belongs to entry i of the batch: Sampled where `sample` was set, None where not, or the
    BatonError that befell this sequence alone. An exception from `step` condemns the whole engine.
    Blocks in the tables belong to the caller's pool; the engine writes positions [start, end) and
    reads [0, end). `close` may be called once, after the last step.
    """

    @property
    def info(self) -> EngineInfo: ...

    @property
    def arena(self) -> Arena: ...

    def step(self, batch: Sequence[SeqStep]) -> list[Sampled | BatonError | None]: ...

    def close(self) -> None: ...
