"""Which worker, if any, serves a prompt alone: what is looked at, and what local.py says of it."""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Generic

from core.ids import Role, WorkerId
from router.decode_load import Then
from router.local import (
    STAYS_CACHED,
    LocalOption,
    LocalVerdict,
    StayOption,
    judge_local,
    judge_stay,
)
from router.members import L
from router.place import Beside, DecodeCacheQuery, PrefillPoolQuery
from router.placement import Local, Outlook, Placement
from router.policies.base import Decision, Scored, sample
from router.pool import Pool
from router.queries import Queries

_HOLDERS = 2
_LOOKS = 2
"""Drawn beside those."""
_STAY_LOOKS = 2
_ALL_HERE = Then(after_s=0.0, due_share=1.0)


class Alone(Generic[L]):
    """One router's."""

    def __init__(self, ask: Queries[L]) -> None:
        self._ask = ask

    def find(self, prefill: PrefillPoolQuery, remote: Decision, total_tokens: int) -> Local[L]:
        """Of the few decode workers that hold most of the prompt and two others, the soonest that
        may take it; without one, the chosen prefill worker if the answer may stay there; without
        that, why the soonest decode worker may not.
        """
        pool = self._ask.fleet.pool(Role.DECODE)
        if not pool.workers:
            return Local(LocalVerdict.NOBODY)
        tokens, closed, known = prefill.tokens, self._ask.closed(pool), self._ask.known
        cached = DecodeCacheQuery(
            pool, known, prefill.now_s, tokens=tokens, hashes=prefill.hashes, closed=closed
        )
        elsewhere, why = Outlook(*prefill.ttft_s(remote.worker_id)), None
        elsewhere_s, steps_to_go = sum(elsewhere), known.curves.steps_to_go
        ways = sorted(_ways(cached), key=_first_token_s)
        for beside in ways:
            worker = beside.worker_id
            option = LocalOption(
                measured=cached.measured(worker),
                fits=partial(self._fits, worker, pool, tokens, total_tokens),
                beside=beside,
                steps_to_go=steps_to_go,
                elsewhere_s=elsewhere_s,
            )
            verdict = judge_local(option, known.slo)
            if verdict is LocalVerdict.LOCAL:
                scored = [_local_way(way, steps_to_go) for way in ways]
                scored.append(_remote_way(remote.worker_id, elsewhere))
                placement = Placement(
                    link=self._ask.fleet.link(Role.DECODE, worker),
                    decision=Decision(worker, scored, "sooner there"),
                    load_tokens=tokens,
                    prompt_tokens=tokens - cached.cached_tokens(worker),
                )
                outlook = Outlook(beside.queue_s, beside.work_s)
                return Local(verdict, placement, outlook, len(pool.workers))
            why = why or verdict
        stays = self._staying(prefill, remote.worker_id, total_tokens)
        return stays or Local(why or LocalVerdict.NOBODY)

    def _staying(
        self, prefill: PrefillPoolQuery, chosen: WorkerId, total_tokens: int
    ) -> Local[L] | None:
        """The answer at the prefill worker chosen for its prompt, if it is to stay there."""
        known, fleet = self._ask.known, self._ask.fleet
        tokens, cached = prefill.tokens, prefill.cached_tokens(chosen)
        may_stay = known.local_decode and not prefill.is_colocated(chosen)
        if not may_stay or cached < STAYS_CACHED * tokens:
            return None
        pool = fleet.pool(Role.DECODE)
        here = self._ask.decode(fleet.pool(Role.PREFILL), tokens, total_tokens)
        decode = self._ask.decode(pool, tokens, total_tokens, closed=self._ask.closed(pool))
        looks = [(worker, decode.load(worker, _ALL_HERE)) for worker in sample(decode, _STAY_LOOKS)]
        loads = [(worker, load) for worker, load in looks if load is not None]
        beside = prefill.beside(chosen)
        option = StayOption(
            measured=prefill.measured(chosen),
            fits=partial(here.fits, chosen),
            beside=beside,
            steps_to_go=known.curves.steps_to_go,
            here=here.load(chosen, _ALL_HERE),
            elsewhere=min((load for _, load in loads), default=None),
        )
        if option.here is None or not judge_stay(option, known.slo):
            return None
        terms = _local_way(beside, option.steps_to_go).terms
        scored = [Scored(chosen, option.here.share, (*terms, ("cached_tokens", cached)))]
        scored += [Scored(w, load.share, (("drain_s", load.drain_s),)) for w, load in loads]
        placement = Placement(
            link=fleet.link(Role.PREFILL, chosen),
            decision=Decision(chosen, scored, "cached there, and less to run"),
            load_tokens=tokens,
            prompt_tokens=tokens - cached,
        )
        return Local(LocalVerdict.STAYS, placement, Outlook(beside.queue_s, beside.work_s))

    def _fits(self, worker: WorkerId, pool: Pool, tokens: int, total_tokens: int) -> bool:
        return self._ask.decode(pool, tokens, total_tokens).fits(worker)


def _ways(query: DecodeCacheQuery) -> Iterator[Beside]:
    drawn = sample(query, _LOOKS)
    for worker in dict.fromkeys(chain(query.holders(_HOLDERS), drawn)):
        yield query.beside(worker)


def _local_way(way: Beside, steps_to_go: int) -> Scored:
    """Its cost is the seconds to the first token; `step_s` what the answers there would take."""
    terms = (
        ("queue_s", way.queue_s),
        ("work_s", way.work_s),
        ("step_s", way.mean_step_s(steps_to_go)),
    )
    return Scored(way.worker_id, way.first_token_s, terms)


def _remote_way(worker: WorkerId, there: Outlook) -> Scored:
    """Likewise, of the prefill worker that would be chosen."""
    elsewhere_s = there.queue_s + there.work_s
    terms = (("elsewhere_s", elsewhere_s), ("queue_s", there.queue_s), ("work_s", there.work_s))
    return Scored(worker, elsewhere_s, terms)


def _first_token_s(beside: Beside) -> float:
    return beside.first_token_s
