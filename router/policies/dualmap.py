"""DualMap as published (ICLR'26, arXiv 2602.06502): two homes of the prompt's key, nothing else.

The home with the longer cached prefix wins, of equals the one with less load; if its predicted TTFT
breaks the target, the home with the lower one. Its third part, moving queued requests between their
homes, is in rebalance.py: a policy only says where a request may go.
"""

from core.ids import WorkerId
from router.policies.base import Decision, PrefillQuery, by_ttft, cheapest, sample
from router.policies.hotness import HotnessTree
from router.policies.ring import TwoRings


class DualMap:
    """Implements router.policies.base.PrefillPolicy."""

    def __init__(self) -> None:
        self._rings = TwoRings()
        self._hotness = HotnessTree()

    def candidates_of(self, query: PrefillQuery) -> list[WorkerId]:
        """The homes; two random workers for a prompt without a full block."""
        self._rings.follow(query.pool)
        key = self._hotness.key(query)
        return sample(query, 2) if key is None else self._rings.homes(key, query.is_open)

    def choose(self, query: PrefillQuery) -> Decision:
        homes = self.candidates_of(query)
        best = min(homes, key=lambda w: (-query.cached_tokens(w), query.queued_tokens(w)))
        scored = [by_ttft(query, worker) for worker in homes]
        ttft_s = next(candidate.cost for candidate in scored if candidate.worker_id == best)
        if ttft_s > query.slo.ttft_s:
            return cheapest(scored, "ttft")
        return Decision(best, scored, "cached")

    def placed(self, query: PrefillQuery, decision: Decision) -> None:
        self._hotness.saw(query)
