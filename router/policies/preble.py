"""Preble's E2, exploit or explore (ICLR'25), without what only its own engine knows.

    exploit   more of the prompt is cached than not: the least loaded of its longest holders
    explore   otherwise: the least L + P, the load of the last 3 minutes and the prefill here

L sums the prefill seconds of the requests placed on a worker in that window. When the most loaded
worker has 1.5 times the load of the least loaded one (after 50 requests per worker), what would be
exploited there goes to the least loaded. The published cost also has M, recomputing what must be
evicted: no router sees that, and in full caches it grows with P on every worker alike.
"""

from collections import Counter, deque

from core.ids import WorkerId
from router.policies.base import Decision, PrefillQuery, Scored, cheapest, cost_of, open_workers

_WINDOW_S = 180.0
_WINDOW_PROMPTS = 65_536
_IMBALANCE = 1.5
_PROMPTS_PER_WORKER = 50
_HOLDERS = 8


class Preble:
    """Implements router.policies.base.PrefillPolicy. Looks at every worker."""

    def __init__(self) -> None:
        self._window: deque[tuple[float, WorkerId, float]] = deque()
        self._load_s: dict[WorkerId, float] = {}
        self._prompts: Counter[WorkerId] = Counter()

    def choose(self, query: PrefillQuery) -> Decision:
        load_s, workers = self._load_s, open_workers(query)
        loads = [Scored(w, s, (("load_s", s),)) for w in workers for s in (load_s.get(w, 0.0),)]
        holders = query.holders(_HOLDERS)
        matched = query.cached_tokens(holders[0]) if holders else 0
        if matched <= query.tokens - matched:
            return cheapest([_explore(query, load) for load in loads], "explore")
        equals = {w for w in holders if query.cached_tokens(w) == matched}
        best = cheapest([load for load in loads if load.worker_id in equals], "exploit")
        least, most = min(loads, key=cost_of), max(loads, key=cost_of)
        enough = len(self._window) >= _PROMPTS_PER_WORKER * len(loads)
        if enough and best.worker_id == most.worker_id and most.cost > _IMBALANCE * least.cost:
            return Decision(least.worker_id, loads, "exploit, redirected")
        return best

    def placed(self, query: PrefillQuery, decision: Decision) -> None:
        old_s = query.now_s - _WINDOW_S
        while self._window and (self._window[0][0] < old_s or len(self._window) >= _WINDOW_PROMPTS):
            self._forget(*self._window.popleft())
        chosen, (_, work_s) = decision.worker_id, query.ttft_s(decision.worker_id)
        self._window.append((query.now_s, chosen, work_s))
        self._load_s[chosen] = self._load_s.get(chosen, 0.0) + work_s
        self._prompts[chosen] += 1

    def _forget(self, _at_s: float, worker: WorkerId, work_s: float) -> None:
        """With its last prompt in the window a worker is forgotten, whether it is there or gone."""
        self._load_s[worker] -= work_s
        self._prompts[worker] -= 1
        if not self._prompts[worker]:
            del self._load_s[worker], self._prompts[worker]


def _explore(query: PrefillQuery, load: Scored) -> Scored:
    _, work_s = query.ttft_s(load.worker_id)
    return Scored(load.worker_id, load.cost + work_s, (*load.terms, ("work_s", work_s)))
