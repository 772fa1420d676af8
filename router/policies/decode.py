"""Baton's decode choice: of two random workers that fit the sequence, the faster one.

A worker fits when the peak its KV is predicted to reach, this sequence included, stays within its
arena (Past-Future, ASPLOS'25; router/curves.py). Of two that fit the lower predicted time per token
wins: two looks bring most of what looking at all would, and routers with stale views do not all
choose the same worker (Mitzenmacher 2001). Workers in the network domain of the KV come first, as
long as the better of two of them keeps the TPOT target.
"""

from collections.abc import Sequence

from core.ids import WorkerId
from router.policies.base import Decision, DecodeQuery, Scored, Stateless, cheapest, sample

_LOOKS = 2
_DRAWS = 8
"""Drawn to find two that fit; when none does, the one with most room is taken."""


class BatonDecode(Stateless):
    """Implements router.policies.base.DecodePolicy."""

    def choose(self, query: DecodeQuery) -> Decision:
        near = _fitting(query, sample(query, _DRAWS, query.near)) if query.near else []
        if near:
            best = cheapest(near, "tpot, near its KV")
            if query.tpot_s(best.worker_id) <= query.slo.tpot_s:
                return best
        drawn = sample(query, _DRAWS)
        fitting = _fitting(query, drawn)
        if fitting:
            return cheapest(fitting, "tpot")
        roomy = [Scored(w, -query.free_tokens(w), (("free", query.free_tokens(w)),)) for w in drawn]
        return cheapest(roomy, "room, as none fits")


def _fitting(query: DecodeQuery, drawn: Sequence[WorkerId]) -> list[Scored]:
    """The first two that fit."""
    found: list[Scored] = []
    for worker in drawn:
        if query.fits(worker):
            context, sequences = query.context_tokens(worker), query.sequences(worker)
            terms = (("sequences", sequences), ("context", context))
            found.append(Scored(worker, query.tpot_s(worker), terms))
            if len(found) == _LOOKS:
                break
    return found
