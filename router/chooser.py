"""Which of the fleet's workers an attempt goes to, from what is connected now."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random

from core.blocks import chain_hashes, root_hash
from core.clock import Clock
from core.errors import NoWorkers
from core.ids import BlockHash, Incarnation, Role, WorkerId
from core.messages import PrefixSource
from core.stages import Stage
from router.client import WorkerLink
from router.curves import Curves
from router.fleet import Fleet
from router.place import DecodePoolQuery, Knowledge, PrefillPoolQuery
from router.policies.base import Decision
from router.policies.build import Policies
from router.pool import Pool
from router.progress import OK, SequenceEnd

_FEW_TOKENS = 8
"""Fewer steps tell too little of what a step takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The link chosen, why, and the load the leg will be to it (tokens).

    `source` is another worker that holds more of the prompt than the chosen one.
    """

    link: WorkerLink
    decision: Decision
    load_tokens: int
    source: PrefixSource | None = None


class Chooser:
    """`failed` are those a request has failed on: chosen again only if there is no other.

    The `for_*` methods note that the sequence is submitted where they say, `explain` nothing.
    """

    def __init__(self, fleet: Fleet, policies: Policies, clock: Clock, random: Random) -> None:
        self._fleet = fleet
        self._policies = policies
        self._clock = clock
        self._known = Knowledge(index=fleet.index, curves=Curves(), slo=policies.slo, random=random)

    def for_prefill(
        self, tokens: Sequence[int], cache_salt: str, failed: set[Incarnation]
    ) -> Placement:
        """A prefill worker for a prompt. Raises NoWorkers."""
        query = self._prefill_query(tokens, cache_salt, failed)
        decision = self._policies.prefill.choose(query)
        self._policies.prefill.placed(query, decision)
        chosen = decision.worker_id
        return Placement(
            link=self._fleet.link(Role.PREFILL, chosen),
            decision=decision,
            load_tokens=len(tokens) - query.cached_tokens(chosen),
            source=query.source(chosen, self._fleet.everyone, failed),
        )

    def for_decode(
        self,
        context_tokens: int,
        total_tokens: int,
        failed: set[Incarnation],
        *,
        kv_address: str = "",
    ) -> Placement:
        """A decode worker for a sequence of so many tokens that may grow to `total_tokens`.

        `kv_address` is that of the worker that has its KV. Raises NoWorkers.
        """
        pool = self._pool(Role.DECODE)
        closed = _closed(pool, failed)
        query = self._decode_query(pool, context_tokens, total_tokens, kv_address, closed)
        return self._decode_placement(query, context_tokens)

    def for_move(
        self, context_tokens: int, total_tokens: int, source: Incarnation, to: WorkerId | None
    ) -> Placement:
        """Another decode worker than `source`, `to` or any. Raises NoWorkers."""
        pool = self._fleet.pool(Role.DECODE)
        closed = pool.named((source,))
        if to is not None:
            closed |= frozenset(pool.workers) - {to}
        if len(closed) == len(pool.workers):
            raise NoWorkers(f"no other decode worker {to or ''} is ready".replace("  ", " "))
        query = self._decode_query(pool, context_tokens, total_tokens, "", closed)
        return self._decode_placement(query, context_tokens)

    def has_decode(self, excluding: set[Incarnation]) -> bool:
        """Whether a decode worker is routable beside these."""
        pool = self._fleet.pool(Role.DECODE)
        return len(pool.named(excluding)) < len(pool.workers)

    def explain(self, tokens: Sequence[int], cache_salt: str, total_tokens: int) -> list[Decision]:
        """Where such a prompt would be prefilled and decoded now. Raises NoWorkers."""
        prefill = self._policies.prefill.choose(self._prefill_query(tokens, cache_salt, ()))
        owner = self._fleet.link(Role.PREFILL, prefill.worker_id)
        address = owner.view.hello.peer_address if owner.view is not None else ""
        pool, none = self._pool(Role.DECODE), frozenset[WorkerId]()
        query = self._decode_query(pool, len(tokens), total_tokens, address, none)
        return [prefill, self._policies.decode.choose(query)]

    # -- learning from answers ------------------------------------------------------------------

    def ended(self, end: SequenceEnd) -> None:
        """Implements router.progress.SequenceObserver."""
        if end.outcome != OK or end.timings.attempts != 1:
            return
        times, now_s, curves = end.timings, end.ended_at_s, self._known.curves
        curves.saw_output(end.output_tokens)
        view = self._fleet.everyone.views.get(WorkerId(times.prefill_worker))
        if view is not None and times.prefill_s > 0:
            prompt = len(end.request.prompt_tokens)
            curves.saw_prefill(view.kind, times.cached_tokens, prompt, times.prefill_s, now_s)
        view = self._fleet.everyone.views.get(WorkerId(times.decode_worker))
        began = next((mark.at_s for mark in end.marks if mark.stage is Stage.DECODE), None)
        steps = end.output_tokens - 2  # the prefill's token, and the one that began the decode
        if view is None or view.load is None or began is None or steps < _FEW_TOKENS:
            return
        if not times.migrations and view.load.running:
            step_s, load = (now_s - began) / steps, view.load
            curves.saw_decode(view.kind, load.running, load.context_tokens, step_s, now_s)

    # -- queries --------------------------------------------------------------------------------

    def _prefill_query(
        self, tokens: Sequence[int], cache_salt: str, failed: Collection[Incarnation]
    ) -> PrefillPoolQuery:
        pool = self._pool(Role.PREFILL)
        return PrefillPoolQuery(
            pool,
            self._known,
            self._clock.now_s(),
            tokens=len(tokens),
            hashes=_hashes(pool, tokens, cache_salt),
            closed=_closed(pool, failed),
        )

    def _decode_query(
        self,
        pool: Pool,
        context_tokens: int,
        total_tokens: int,
        kv_address: str,
        closed: frozenset[WorkerId],
    ) -> DecodePoolQuery:
        return DecodePoolQuery(
            pool,
            self._known,
            self._clock.now_s(),
            tokens=context_tokens,
            max_tokens=total_tokens,
            kv_address=kv_address,
            closed=closed,
        )

    def _decode_placement(self, query: DecodePoolQuery, context_tokens: int) -> Placement:
        decision = self._policies.decode.choose(query)
        self._policies.decode.placed(query, decision)
        link = self._fleet.link(Role.DECODE, decision.worker_id)
        return Placement(link=link, decision=decision, load_tokens=context_tokens)

    def _pool(self, role: Role) -> Pool:
        pool = self._fleet.pool(role)
        if not pool.workers:
            raise NoWorkers(f"no {role} worker is ready; try again, or see `baton status`")
        return pool


def _closed(pool: Pool, failed: Collection[Incarnation]) -> frozenset[WorkerId]:
    """The failed ones; nobody when that is everybody."""
    closed = pool.named(failed)
    return closed if len(closed) < len(pool.workers) else frozenset()


def _hashes(pool: Pool, tokens: Sequence[int], cache_salt: str) -> list[BlockHash]:
    """Block hashes of a prompt, in the block size all workers of the model share."""
    hello = pool.views[pool.workers[0]].hello
    return chain_hashes(tokens, hello.layout.block_size, root_hash(hello.model_id, cache_salt))
