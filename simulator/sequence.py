"""A sequence as scheduling sees it: lengths and hashes instead of tokens."""

from collections.abc import Callable, Sequence
from typing import Protocol

from core.ids import BlockHash, BlockId, RequestId, SequenceId
from core.step import StepWork
from engine.pool import BlockPool
from engine.sequence import SequenceState

ANY = SequenceId(RequestId("simulated"))
"""Readers here never ask for another's lease."""
ROOT = BlockHash(bytes(16))
"""The parent of a prompt's first block."""


class Leg(Protocol):
    """Whoever submitted a sequence. After `ended` its blocks are given back."""

    def computed(self, sequence: "SimSequence") -> None:
        """More KV of its context is final."""
        ...

    def first_token(self, sequence: "SimSequence") -> bool:
        """Its context is computed and a token sampled; answers whether it goes on here."""
        ...

    def ended(self, sequence: "SimSequence") -> None:
        """Its last token is out."""
        ...


class SimSequence:
    """Implements engine.scheduler.Schedulable. `outputs_left` counts the tokens to sample here.

    While it decodes in a run of steps, the worker brings the counts up to date when they matter:
    `joined` is the worker's step count they are true at, and `turn` names its
    stay in the batch; -1 outside. Its client lets it grow to `most_tokens`.
    """

    __slots__ = (
        "_hashes",
        "arrived_at_s",
        "blocks",
        "cached_tokens",
        "cancelled",
        "computed",
        "context_tokens",
        "joined",
        "known_tokens",
        "leg",
        "most_tokens",
        "on_preempted",
        "on_starved",
        "outputs_left",
        "prompt_tokens",
        "published",
        "queued_tokens",
        "started_at_s",
        "state",
        "turn",
        "work_before",
    )

    def __init__(
        self,
        leg: Leg,
        *,
        context_tokens: int,
        outputs_left: int,
        hashes: Sequence[BlockHash],
        most_tokens: int = 0,
        emitted: int = 0,
        arrived_at_s: float,
    ) -> None:
        self.leg = leg
        self.context_tokens = self.known_tokens = context_tokens
        self.outputs_left = outputs_left
        self.most_tokens = context_tokens + max(most_tokens, outputs_left)
        self.prompt_tokens = context_tokens - emitted
        self._hashes = hashes
        self.arrived_at_s = arrived_at_s
        self.started_at_s: float | None = None
        self.work_before = StepWork()
        self.state = SequenceState.WAITING
        self.computed = 0
        self.cached_tokens = 0
        self.published = 0
        self.blocks: list[BlockId] = []
        self.on_preempted: Callable[[], None] | None = None
        self.on_starved: Callable[[], None] | None = None
        self.cancelled = False
        self.joined = self.turn = -1
        self.queued_tokens = 0

    @property
    def pending_tokens(self) -> int:
        return self.known_tokens - self.computed

    @property
    def tokens(self) -> Sequence[int]:
        """Numbers in their place."""
        return range(self.known_tokens)

    @property
    def sequence_id(self) -> SequenceId:
        return ANY

    def block_hashes(self, count: int, block_size: int) -> Sequence[BlockHash]:
        """Of blocks of the prompt; what it generates has no hash here."""
        return self._hashes[:count]

    def publish(self, pool: BlockPool, block_size: int) -> None:
        """As engine.sequence.Sequence.publish."""
        hashes, first = self._hashes, self.published
        full = min(self.computed // block_size, len(hashes))
        if full > first:
            parent = hashes[first - 1] if first else ROOT
            pool.publish(self.blocks, first, hashes[first:full], parent)
            self.published = full

    def append(self) -> None:
        """A token was sampled."""
        self.known_tokens += 1
        self.outputs_left -= 1
