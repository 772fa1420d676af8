"""Mooncake's choice: the least predicted TTFT of all workers (FAST'25, Algorithm 1).

TTFT = queue + prefill of what is not cached there. Of the algorithm's third term, fetching the
prefix from its holder, the router leaves the decision to the worker that would fetch, so it is not
predicted here.
"""

from router.policies.base import Decision, PrefillQuery, Stateless, by_ttft, cheapest, open_workers


class MooncakeTtft(Stateless):
    """Implements router.policies.base.PrefillPolicy. Looks at every worker."""

    def choose(self, query: PrefillQuery) -> Decision:
        return cheapest([by_ttft(query, w) for w in open_workers(query)], "ttft")
