"""Prefix affinity with a balance threshold, as SGLang's gateway does it (sgl-model-gateway, policy
`cache_aware`, with its defaults).

    unbalanced   most - least requests > 64 and most > 1.5 * least: the worker with the fewest
    matched      the longest cached prefix is more than 0.3 of the prompt: its holder
    otherwise    the worker with the fewest requests

The gateway matches against a tree of its own past choices; here the matches are the workers' own.
"""

from router.policies.base import Decision, PrefillQuery, Scored, Stateless, cheapest, open_workers

_CACHE_THRESHOLD = 0.3
_BALANCE_ABS = 64
_BALANCE_REL = 1.5


class PrefixAffinity(Stateless):
    """Implements router.policies.base.PrefillPolicy. Looks at every worker."""

    def choose(self, query: PrefillQuery) -> Decision:
        loads = [
            Scored(w, query.sequences(w), (("requests", query.sequences(w)),))
            for w in open_workers(query)
        ]
        least, most = min(load.cost for load in loads), max(load.cost for load in loads)
        if most - least > _BALANCE_ABS and most > _BALANCE_REL * least:
            return cheapest(loads, "unbalanced")
        for worker in query.holders(1):
            cached = query.cached_tokens(worker)
            if cached > _CACHE_THRESHOLD * query.tokens:
                return Decision(worker, [Scored(worker, -cached, (("cached", cached),))], "matched")
        return cheapest(loads, "not matched")
