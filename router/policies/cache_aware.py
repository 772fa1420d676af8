"""Cache-aware prefill choice: a small candidate set, then one cost.

Candidates are the holders of the longest cached prefix and two random workers; the cost is

    weight * queued tokens + own uncached tokens

Random candidates keep a hot prefix from drawing all traffic to one worker (power of two choices),
and a small weight keeps a prompt with its cache as long as the queue there is short.
"""

from collections.abc import Sequence
from random import Random

from router.policies.base import Decision, PrefillCandidate, Scored, cheapest

_HOLDERS = 2
_RANDOM = 2


class CacheAware:
    """Implements router.policies.base.PrefillPolicy."""

    def __init__(self, queue_weight: float) -> None:
        self._queue_weight = queue_weight

    def choose(
        self, prompt_tokens: int, workers: Sequence[PrefillCandidate], random: Random
    ) -> Decision:
        holders = sorted(workers, key=lambda w: (-w.cached_tokens, w.queued_tokens))[:_HOLDERS]
        others = [w for w in workers if w not in holders]
        looked_at = holders + random.sample(others, min(_RANDOM, len(others)))
        return cheapest([self._score(prompt_tokens, worker) for worker in looked_at])

    def _score(self, prompt_tokens: int, worker: PrefillCandidate) -> Scored:
        uncached = prompt_tokens - worker.cached_tokens
        return Scored(
            worker_id=worker.worker_id,
            cost=self._queue_weight * worker.queued_tokens + uncached,
            terms=f"queued={worker.queued_tokens} uncached={uncached}",
        )
