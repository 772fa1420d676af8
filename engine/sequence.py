"""One sequence on one worker: its tokens, how far its KV reaches, and which blocks hold it."""

from collections.abc import Callable, Collection
from enum import Enum
from typing import Self

from core.blocks import chain_hashes, root_hash
from core.ids import BlockHash, BlockId, ModelId, SequenceId
from core.messages import DecodeSubmit, PrefillSubmit
from core.sampling import FinishReason, SamplingParams
from core.step import StepWork
from engine.pool import BlockPool
from engine.types import Sampled, SeqStep


class SequenceState(Enum):
    """WAITING -> RUNNING -> DONE; RUNNING -> WAITING when preempted; RUNNING <-> HELD -> DONE."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    DONE = "done"


class Sequence:
    """Mutable; owned by the event loop. The engine thread sees only SeqSteps made from it.

    tokens  |-- context at submit --|-- sampled here --|
    KV      |-- published blocks --|-- computed --|
    """

    def __init__(
        self,
        *,
        sequence_id: SequenceId,
        context: Collection[int],
        output_position: int,
        sampling: SamplingParams,
        root: BlockHash,
        deadline_at_s: float,
        arrived_at_s: float,
    ) -> None:
        self.sequence_id = sequence_id
        self.tokens = list(context)
        self.context_tokens = len(context)
        self.first_output_position = output_position
        self.sampling = sampling
        self.deadline_at_s = deadline_at_s
        self.arrived_at_s = arrived_at_s
        self.started_at_s: float | None = None
        self.work_before = StepWork()
        """Of the steps before its first one."""
        self.state = SequenceState.WAITING
        self.computed = 0
        self.cached_tokens = 0
        self.blocks: list[BlockId] = []
        self.published = 0
        self.on_preempted: Callable[[], None] | None = None
        """Set by whoever copies its blocks while it runs; called before they are given back."""
        self.on_starved: Callable[[], None] | None = None
        """Set by whoever keeps blocks of it leased while it waits; called where nobody can go on
        unless they go back. Ends it.
        """
        self._root = root
        self._hashes: list[BlockHash] = []

    @classmethod
    def of(cls, submit: PrefillSubmit | DecodeSubmit, model_id: ModelId, now_s: float) -> Self:
        """The sequence a router asks for."""
        return cls(
            sequence_id=submit.sequence_id,
            context=submit.tokens,
            output_position=submit.output_position,
            sampling=submit.sampling,
            root=root_hash(model_id, submit.cache_salt),
            deadline_at_s=now_s + submit.deadline_s,
            arrived_at_s=now_s,
        )

    @property
    def done(self) -> bool:
        return self.state is SequenceState.DONE

    @property
    def known_tokens(self) -> int:
        """Of the context and sampled so far."""
        return len(self.tokens)

    @property
    def pending_tokens(self) -> int:
        """Tokens whose KV is not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def next_output_position(self) -> int:
        """Absolute output position of the token to sample next."""
        return self.first_output_position + len(self.tokens) - self.context_tokens

    def make_step(self, count: int) -> SeqStep:
        """Feed the next `count` tokens; samples when they are the last ones known."""
        end = self.computed + count
        last = end == len(self.tokens)
        return SeqStep(
            sequence_id=self.sequence_id,
            tokens=self.tokens,
            start=self.computed,
            end=end,
            block_table=self.blocks,
            sample=self.sampling if last else None,
            output_position=self.next_output_position,
        )

    def append(self, sampled: Sampled) -> FinishReason | None:
        """Take a sampled token; answers why the sequence ends with it, if it does."""
        position = self.next_output_position
        self.tokens.append(sampled.token)
        if sampled.token in self.sampling.stop_token_ids:
            return FinishReason.STOP
        if position + 1 >= self.sampling.max_tokens:
            return FinishReason.LENGTH
        return None

    def block_hashes(self, count: int, block_size: int) -> list[BlockHash]:
        """Hashes of the first `count` full blocks of the known tokens; each computed once."""
        known = len(self._hashes)
        if known < count:
            parent = self._hashes[-1] if known else self._root
            rest = self.tokens[known * block_size : count * block_size]
            self._hashes += chain_hashes(rest, block_size, parent)
        return self._hashes[:count]

    def publish(self, pool: BlockPool, block_size: int) -> None:
        """Offer the blocks that are full and computed to the prefix cache."""
        full = self.computed // block_size
        if full == self.published:
            return
        first, hashes = self.published, self.block_hashes(full, block_size)
        parent = hashes[first - 1] if first else self._root
        pool.publish(self.blocks, first, hashes[first:], parent)
        self.published = full
