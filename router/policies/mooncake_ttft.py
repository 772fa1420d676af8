"""Mooncake's choice: the least predicted TTFT of all workers (FAST'25, Algorithm 1).

TTFT = queue + prefill of what is not cached there. Of the algorithm's third term, fetching the
prefix from its holder, the router leaves the decision to the worker that would fetch, so it is not
predicted here.
"""

from core.ids import WorkerId
from router.policies.base import (
    Decision,
    PrefillQuery,
    Scored,
    Stateless,
    cheapest,
    open_workers,
    shuffled,
)


class MooncakeTtft(Stateless):
    """Implements router.policies.base.PrefillPolicy. Looks at every worker."""

    def choose(self, query: PrefillQuery) -> Decision:
        return cheapest([_score(query, w) for w in shuffled(query, open_workers(query))], "ttft")


def _score(query: PrefillQuery, worker: WorkerId) -> Scored:
    queue_s, work_s = query.ttft_s(worker)
    return Scored(worker, queue_s + work_s, (("queue_s", queue_s), ("work_s", work_s)))
