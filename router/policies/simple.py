"""Choices that look at load or at nothing: for comparison, and for users who know them.

Power of two: M. Mitzenmacher, "The power of two choices in randomized load balancing", 2001.
"""

from core.ids import WorkerId
from router.policies.base import (
    Decision,
    DecodeQuery,
    PrefillQuery,
    Query,
    Scored,
    Stateless,
    cheapest,
    open_workers,
    sample,
)


class RoundRobin:
    """One after the other, in order of id. Implements both kinds of policy."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, query: Query) -> Decision:
        pool = query.pool
        order = (pool[i % len(pool)] for i in range(self._next, self._next + len(pool)))
        return Decision(next(w for w in order if query.is_open(w)), (), "turn")

    def placed(self, query: Query, decision: Decision) -> None:
        self._next += 1


class Uniform(Stateless):
    """Any, with equal chance. Implements both kinds of policy."""

    def choose(self, query: Query) -> Decision:
        return Decision(sample(query, 1)[0], (), "chance")


class LeastLoad(Stateless):
    """The shortest queue of all, in uncached tokens. Looks at every worker."""

    def choose(self, query: PrefillQuery) -> Decision:
        return cheapest([_queued(query, w) for w in open_workers(query)])


class PowerOfTwo(Stateless):
    """The shorter queue of two random workers, in uncached tokens."""

    def choose(self, query: PrefillQuery) -> Decision:
        return cheapest([_queued(query, worker) for worker in sample(query, 2)])


class DecodeLeastLoad(Stateless):
    """The least context of all. Looks at every worker."""

    def choose(self, query: DecodeQuery) -> Decision:
        return cheapest([_context(query, w) for w in open_workers(query)])


class DecodePowerOfTwo(Stateless):
    """The less context of two random workers."""

    def choose(self, query: DecodeQuery) -> Decision:
        return cheapest([_context(query, worker) for worker in sample(query, 2)])


def _queued(query: PrefillQuery, worker: WorkerId) -> Scored:
    queued = query.queued_tokens(worker)
    return Scored(worker, queued, (("queued", queued),))


def _context(query: DecodeQuery, worker: WorkerId) -> Scored:
    context, sequences = query.context_tokens(worker), query.sequences(worker)
    return Scored(worker, context + sequences, (("context", context), ("sequences", sequences)))
