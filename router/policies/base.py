"""The seam of placement: what a policy sees of workers, and what it answers.

Values in, value out; randomness is passed in. The simulator and the live router call the same
policies. `choose` gets at least one worker and answers one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

from core.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCandidate:
    """A routable prefill worker, for one prompt."""

    worker_id: WorkerId
    cached_tokens: int
    """Tokens of this prompt whose KV it holds, as far as the router knows."""
    queued_tokens: int
    """Uncached prompt tokens in front of this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCandidate:
    """A routable decode worker."""

    worker_id: WorkerId
    sequences: int
    context_tokens: int
    free_tokens: int
    """Tokens its free and evictable blocks hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One candidate and its cost; lower is better."""

    worker_id: WorkerId
    cost: float
    terms: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The choice, and everything it was chosen from."""

    worker_id: WorkerId
    candidates: tuple[Scored, ...]

    def explain(self) -> str:
        """One line: the choice, then each candidate with its terms."""
        parts = [f"{c.worker_id}={c.cost:.1f}({c.terms})" for c in self.candidates]
        return f"{self.worker_id} of {' '.join(parts)}"


class PrefillPolicy(Protocol):
    def choose(
        self, prompt_tokens: int, workers: Sequence[PrefillCandidate], random: Random
    ) -> Decision: ...


class DecodePolicy(Protocol):
    def choose(
        self, total_tokens: int, workers: Sequence[DecodeCandidate], random: Random
    ) -> Decision: ...


def cheapest(candidates: Sequence[Scored]) -> Decision:
    """The first of the lowest cost."""
    best = min(candidates, key=lambda candidate: candidate.cost)
    return Decision(worker_id=best.worker_id, candidates=tuple(candidates))
