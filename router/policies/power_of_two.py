"""Power-of-two decode choice: of two random workers that fit the sequence, the less loaded.

M. Mitzenmacher, "The power of two choices in randomized load balancing", 2001: two looks bring most
of what looking at all would, and routers with stale views do not all pick the same worker.
"""

from collections.abc import Sequence
from random import Random

from router.policies.base import Decision, DecodeCandidate, Scored, cheapest


class PowerOfTwo:
    """Implements router.policies.base.DecodePolicy."""

    def choose(
        self, total_tokens: int, workers: Sequence[DecodeCandidate], random: Random
    ) -> Decision:
        fitting = [w for w in workers if w.free_tokens >= total_tokens] or list(workers)
        looked_at = random.sample(fitting, min(2, len(fitting)))
        return cheapest([_score(worker) for worker in looked_at])


def _score(worker: DecodeCandidate) -> Scored:
    return Scored(
        worker_id=worker.worker_id,
        cost=worker.context_tokens + worker.sequences,
        terms=f"sequences={worker.sequences} context={worker.context_tokens}",
    )
