"""Baton's prefill choice: a small candidate set, then one cost in seconds.

    candidates   the two homes of the prompt's key (ring.py, hotness.py), the few workers that hold
                 its longest cached prefixes, a few that are about to (router/coming.py), and two
                 random ones; four if less than half is cached anywhere: then a short queue is all
                 there is to find
    cost         w * seconds of its queue + seconds of the prompt's own uncached tokens, where what
                 the prompts before it will leave in the cache counts as cached
    w            the share of workers that are idle, but no less than the configured weight

Where some candidates are faster than others:

    cost         w * seconds of its queue and those tokens + (1 - w) * what the fastest of the
                 candidates would take for those tokens

The lowest cost wins. If queue + own work there break the TTFT target, the lowest cost among the
idle candidates that keep it wins instead. Busy ones do not count: what saves one prompt there
computes what is cached elsewhere and pushes out what is cached there, and near the knee that costs
more prompts their target than it saves (`baton bench routing`).

Work that a cache would have saved delays whoever comes after it, unless there is an idle worker to
go to. So where many are idle a prompt goes where its own first token is soonest, and the fewer are,
the longer it waits for its cache. A fixed w of 0.05 loses half a second of mean TTFT at moderate
load, one of 0.2 costs a quarter of agents' prompts their target near the knee
(docs/reproduction.md, row 4).

What is computed delays others by its share of what all workers can do, wherever that is: a slow
worker's second delays fewer prompts than a fast one's. So how fast a candidate is counts for the
prompt's own first token alone. Otherwise prompts wait for a fast worker until the wait, times w, is
what a slow one would take longer (docs/simulation.md, GPUs of several kinds).

The homes give prompts of one key a place to build a cache in; the random ones keep a hot prefix
from drawing all traffic to a few workers, and routers with stale views from all choosing the same
one (M. Mitzenmacher, "The power of two choices in randomized load balancing", 2001).
"""

from core.ids import WorkerId
from router.policies.base import Decision, PrefillQuery, Scored, cost_of, sample
from router.policies.hotness import HotnessTree
from router.policies.ring import TwoRings

_HOLDERS = 4
_COMING = 2
_RANDOM = 2
_RANDOM_COLD = 4
_LOOKS = 64
"""Prompts over which the share of busy workers is averaged."""


class Baton:
    """Implements router.policies.base.PrefillPolicy."""

    def __init__(self, queue_weight: float) -> None:
        self._least_weight = queue_weight
        self._busy = 1.0
        """Share of the workers."""
        self._rings = TwoRings()
        self._hotness = HotnessTree()

    def candidates_of(self, query: PrefillQuery) -> list[WorkerId]:
        """Where the prompt may go, also later while it is queued (rebalance.py); homes first."""
        self._rings.follow(query.pool)
        key = self._hotness.key(query)
        homes = self._rings.homes(key, query.is_open) if key is not None else ()
        holders = query.holders(_HOLDERS)
        cached = query.cached_tokens(holders[0]) if holders else 0
        drawn = sample(query, _RANDOM if 2 * cached >= query.tokens else _RANDOM_COLD)
        return list(dict.fromkeys((*homes, *holders, *query.coming(_COMING), *drawn)))

    def choose(self, query: PrefillQuery) -> Decision:
        weight = max(self._least_weight, 1 - self._busy)
        candidates = self.candidates_of(query)
        scored = [_score(query, worker, weight) for worker in candidates]
        if fastest_s := query.fastest_s(candidates):
            scored = [_mixed(*each, weight) for each in zip(scored, fastest_s, strict=True)]
        best = min(scored, key=cost_of)
        if _ttft_s(best) <= query.slo.ttft_s:
            return Decision(best.worker_id, scored, "cost")
        keeping = [s for s in scored if _is_idle(s) and _ttft_s(s) <= query.slo.ttft_s]
        if not keeping:
            return Decision(best.worker_id, scored, "cost, beyond the target")
        return Decision(min(keeping, key=cost_of).worker_id, scored, "target")

    def placed(self, query: PrefillQuery, decision: Decision) -> None:
        self._hotness.saw(query)
        other = next((w for w in sample(query, 2) if w != decision.worker_id), None)
        if other is not None:  # any other one is busy as often as all are
            self._busy += ((query.queued_tokens(other) > 0) - self._busy) / _LOOKS


def _score(query: PrefillQuery, worker: WorkerId, weight: float) -> Scored:
    queue_s, work_s = query.expected_s(worker)
    return Scored(worker, weight * queue_s + work_s, (("queue_s", queue_s), ("work_s", work_s)))


def _mixed(candidate: Scored, fastest_s: float, weight: float) -> Scored:
    terms = (*candidate.terms, ("fastest_s", fastest_s))
    return candidate._replace(
        cost=weight * _ttft_s(candidate) + (1 - weight) * fastest_s, terms=terms
    )


def _is_idle(candidate: Scored) -> bool:
    return candidate.terms[0][1] <= 0


def _ttft_s(candidate: Scored) -> float:
    (_, queue_s), (_, work_s), *_ = candidate.terms
    return queue_s + work_s
