"""Dynamo's block cost over all workers (ai-dynamo, lib/kv-router, the default selector).

    cost = queued prefill blocks + the prompt's blocks - its cached blocks there + active blocks

with its defaults (overlap credit and prefill scale 1, temperature 0), the lowest cost wins, equal
ones by chance. Active blocks are those of running decodes: none on a worker that only prefills.
"""

from core.ids import WorkerId
from router.policies.base import Decision, PrefillQuery, Scored, Stateless, cheapest, open_workers


class DynamoCost(Stateless):
    """Implements router.policies.base.PrefillPolicy. Looks at every worker."""

    def choose(self, query: PrefillQuery) -> Decision:
        return cheapest([_score(query, w) for w in open_workers(query)])


def _score(query: PrefillQuery, worker: WorkerId) -> Scored:
    queued = query.queued_tokens(worker) / query.block_size
    uncached = (query.tokens - query.cached_tokens(worker)) / query.block_size
    return Scored(worker, queued + uncached, (("queued", queued), ("uncached", uncached)))
