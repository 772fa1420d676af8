"""Prompts this router has sent to prefill workers, until their first token or the end of their leg.

What they will leave in caches counts for those that come (coming.py), and those that have not begun
may move to another worker (rebalancer.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from core.ids import BlockHash, WorkerId
from router.coming import Coming, steps_of

_LOOKS = 256


@dataclass(slots=True, eq=False, kw_only=True)
class QueuedPrompt:
    """One prompt at one worker. Seconds are as predicted when it was placed, times monotonic."""

    worker_id: WorkerId
    tokens: int
    hashes: Sequence[BlockHash]
    block_size: int
    candidates: tuple[WorkerId, ...]
    """Where it may go, `worker_id` among them."""
    queue_s: float
    """Of what was before it."""
    work_s: float
    """Of its own uncached tokens."""
    submitted_at_s: float
    arrived_at_s: float = 0.0
    """At the router: its target counts from here."""
    move: Callable[[WorkerId], None] | None = None
    """Asks for it to be moved there, once; None where it must stay."""

    @property
    def due_at_s(self) -> float:
        """When its first token was predicted to come."""
        return self.submitted_at_s + self.queue_s + self.work_s

    def overdue_s(self, now_s: float) -> float:
        """How much later its first token is than was predicted; below 0 while it is not."""
        return now_s - self.due_at_s


class QueuedPrompts:
    """Every `add` is followed by a `discard`, which may be repeated."""

    def __init__(self, coming: Coming) -> None:
        self._coming = coming
        self._at: dict[WorkerId, dict[QueuedPrompt, Sequence[BlockHash]]] = {}

    def add(self, prompt: QueuedPrompt) -> None:
        """It was submitted."""
        steps = steps_of(prompt.hashes, prompt.block_size)
        self._at.setdefault(prompt.worker_id, {})[prompt] = steps
        self._coming.add(prompt.worker_id, steps)

    def discard(self, prompt: QueuedPrompt) -> None:
        """It has its first token, or is given up."""
        prompts = self._at.get(prompt.worker_id)
        steps = prompts.pop(prompt, None) if prompts else None
        if steps is not None:
            self._coming.drop(prompt.worker_id, steps)
        if prompts is not None and not prompts:
            del self._at[prompt.worker_id]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._at)

    def due_share(self, by_s: float) -> float:
        """Of some of them, those whose first token should have come by then; 1 without any."""
        some = list(islice(chain.from_iterable(self._at.values()), _LOOKS))
        return sum(prompt.due_at_s <= by_s for prompt in some) / len(some) if some else 1.0

    def workers(self) -> list[WorkerId]:
        """Where any are."""
        return list(self._at)

    def at(self, worker_id: WorkerId) -> list[QueuedPrompt]:
        """In the order they were submitted."""
        return list(self._at.get(worker_id, ()))
