"""Which of the fleet's workers an attempt goes to, from what is connected now."""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from itertools import chain
from random import Random
from typing import Generic

from core.blocks import chain_hashes, root_hash
from core.clock import Clock
from core.errors import NoWorkers
from core.ids import BlockHash, Incarnation, Role, WorkerId
from router.config import DecodeAdmission
from router.curves import Curves
from router.decode_load import DecodeLoad, Then
from router.learning import Learning
from router.local import (
    STAYS_CACHED,
    LocalOption,
    LocalVerdict,
    StayOption,
    judge_local,
    judge_stay,
)
from router.members import L, Members
from router.outliers import NO_OUTLIERS, Outliers
from router.place import Beside, DecodeCacheQuery, DecodePoolQuery, Knowledge, PrefillPoolQuery
from router.placement import Considered, Explained, Local, Outlook, Placement
from router.policies.base import Decision, Scored, sample
from router.policies.build import Policies
from router.pool import Pool
from router.queued import QueuedPrompt, QueuedPrompts
from router.types import Shut
from router.watcher import Unwatched

_LOCAL_HOLDERS = 2
_LOCAL_LOOKS = 2
"""Drawn beside those."""
_DECODE_LOOKS = 8
_STAY_LOOKS = 2
_ALL_HERE = Then(after_s=0.0, due_share=1.0)


class Chooser(Generic[L]):
    """`failed` are those a request has failed on: chosen again only if there is no other.

    The `for_*` methods note that the sequence is submitted where they say, `explain` nothing.
    """

    def __init__(
        self,
        fleet: Members[L],
        policies: Policies,
        clock: Clock,
        random: Random,
        outliers: Outliers | None = None,
    ) -> None:
        self._outliers = outliers or Outliers(NO_OUTLIERS, Unwatched())
        self._fleet = fleet
        self._policies = policies
        self._clock = clock
        self._known = Knowledge(
            index=fleet.index,
            curves=Curves(),
            slo=policies.slo,
            step_s=policies.step_s,
            local_decode=policies.local_decode,
            random=random,
        )
        self.learning = Learning(fleet, self._known, self._outliers, clock)
        self.queued = QueuedPrompts(self._known.coming)
        """Prompts on their way, noted by whoever submits them."""

    def for_prefill(self, tokens: Sequence[int], cache_salt: str, shut: Shut) -> Placement[L]:
        """A prefill worker for a prompt. Raises NoWorkers."""
        return self.place(self.consider(tokens, cache_salt, shut.all), shut.failed)

    def consider(
        self,
        tokens: Sequence[int],
        cache_salt: str,
        failed: Collection[Incarnation] = (),
        *,
        hashes: Sequence[BlockHash] | None = None,
        local_total: int | None = None,
    ) -> Considered[L]:
        """As `for_prefill`, before it is submitted there; `hashes` of the prompt, if known already.

        With `local_total`, the tokens the sequence may grow to, one worker may be found that serves
        it alone. Raises NoWorkers.
        """
        hashes = self._hashes_of(tokens, cache_salt) if hashes is None else hashes
        query = self._prefill_query(len(tokens), failed, hashes)
        decision = self._policies.prefill.choose(query)
        if local_total is None:
            return Considered(query, decision)
        return Considered(query, decision, self._local(query, decision, local_total))

    def place(
        self, considered: Considered[L], failed: Collection[Incarnation] = ()
    ) -> Placement[L]:
        """The prompt will be submitted where it was considered, without an `await` in between, and
        read nothing from the `failed`.
        """
        query, decision = considered.query, considered.decision
        self._policies.prefill.placed(query, decision)
        chosen = decision.worker_id
        self._placed(Role.PREFILL, chosen, query.now_s)
        return Placement(
            link=self._fleet.link(Role.PREFILL, chosen),
            decision=decision,
            load_tokens=query.tokens,
            prompt_tokens=query.tokens - query.cached_tokens(chosen),
            source=query.source(chosen, self._fleet.everyone, failed),
            queued=_queued(query, decision),
        )

    def consider_at(
        self,
        worker: WorkerId,
        tokens: Sequence[int],
        cache_salt: str,
        failed: Collection[Incarnation],
        *,
        hashes: Sequence[BlockHash] | None = None,
    ) -> Considered[L] | None:
        """As `consider`, with the choice made; None if no prompt may go there now."""
        if not self._fleet.pool(Role.PREFILL).workers:
            return None
        hashes = self._hashes_of(tokens, cache_salt) if hashes is None else hashes
        query = self._prefill_query(len(tokens), failed, hashes)
        if worker not in query.pool or not query.is_open(worker):
            return None
        queue_s, work_s = query.expected_s(worker)
        scored = Scored(worker, queue_s + work_s, (("queue_s", queue_s), ("work_s", work_s)))
        return Considered(query, Decision(worker, [scored], "requeued"))

    def queue_s(self, worker: WorkerId) -> float | None:
        """Seconds of what waits at a prefill worker; None if that is not in the pool."""
        pool = self._fleet.pool(Role.PREFILL)
        if worker not in pool.views:
            return None
        return self._prefill_query(1, (), ()).expected_s(worker)[0]

    def idle_work_s(self, prompt: QueuedPrompt) -> dict[WorkerId, float]:
        """Seconds of work the prompt is at those other candidates of it that have no queue."""
        views = self._fleet.pool(Role.PREFILL).views
        others = (worker for worker in prompt.candidates if worker != prompt.worker_id)
        idle = [w for w in others if w in views and views[w].queued_tokens <= 0]
        if not idle:  # the most frequent answer, to a question asked of whole queues
            return {}
        query = self._prefill_query(prompt.tokens, (), prompt.hashes)
        return {worker: query.expected_s(worker)[1] for worker in idle if query.is_open(worker)}

    def place_locally(self, considered: Considered[L]) -> Placement[L] | None:
        """As `place`, where one worker serves the prompt alone; None where none does."""
        placement = considered.local.placement
        if placement is None:
            return None
        role = Role.DECODE
        if considered.local.verdict is LocalVerdict.STAYS:
            role = Role.PREFILL
            self._policies.prefill.placed(considered.query, considered.decision)
        self._placed(role, placement.decision.worker_id, considered.query.now_s)
        return placement

    def _local(self, prefill: PrefillPoolQuery, remote: Decision, total_tokens: int) -> Local[L]:
        """Of the few decode workers that hold most of the prompt and two others, the soonest that
        may take it; without one, the chosen prefill worker if the answer may stay there; without
        that, why the soonest decode worker may not.
        """
        pool = self._fleet.pool(Role.DECODE)
        if not pool.workers:
            return Local(LocalVerdict.NOBODY)
        tokens, closed = prefill.tokens, self._closed(pool, ())
        cached = DecodeCacheQuery(
            pool, self._known, prefill.now_s, tokens=tokens, hashes=prefill.hashes, closed=closed
        )
        elsewhere, why = Outlook(*prefill.ttft_s(remote.worker_id)), None
        elsewhere_s, steps_to_go = sum(elsewhere), self._known.curves.steps_to_go
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
            verdict = judge_local(option, self._known.slo)
            if verdict is LocalVerdict.LOCAL:
                scored = [_local_way(way, steps_to_go) for way in ways]
                scored.append(_remote_way(remote.worker_id, elsewhere))
                placement = Placement(
                    link=self._fleet.link(Role.DECODE, worker),
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
        tokens, cached = prefill.tokens, prefill.cached_tokens(chosen)
        if not self._known.local_decode or cached < STAYS_CACHED * tokens:
            return None
        pool = self._fleet.pool(Role.DECODE)
        here = self._decode_query(
            self._fleet.pool(Role.PREFILL), tokens, total_tokens, "", frozenset()
        )
        decode = self._decode_query(pool, tokens, total_tokens, "", self._closed(pool, ()))
        looks = [(worker, decode.load(worker, _ALL_HERE)) for worker in sample(decode, _STAY_LOOKS)]
        loads = [(worker, load) for worker, load in looks if load is not None]
        beside = prefill.beside(chosen)
        option = StayOption(
            measured=prefill.measured(chosen),
            fits=partial(here.fits, chosen),
            beside=beside,
            steps_to_go=self._known.curves.steps_to_go,
            here=here.load(chosen, _ALL_HERE),
            elsewhere=min((load for _, load in loads), default=None),
        )
        if option.here is None or not judge_stay(option, self._known.slo):
            return None
        terms = _local_way(beside, option.steps_to_go).terms
        scored = [Scored(chosen, option.here.share, (*terms, ("cached_tokens", cached)))]
        scored += [Scored(w, load.share, (("drain_s", load.drain_s),)) for w, load in loads]
        placement = Placement(
            link=self._fleet.link(Role.PREFILL, chosen),
            decision=Decision(chosen, scored, "cached there, and less to run"),
            load_tokens=tokens,
            prompt_tokens=tokens - cached,
        )
        return Local(LocalVerdict.STAYS, placement, Outlook(beside.queue_s, beside.work_s))

    def _fits(self, worker: WorkerId, pool: Pool, tokens: int, total_tokens: int) -> bool:
        return self._decode_query(pool, tokens, total_tokens, "", frozenset()).fits(worker)

    def decode_load(self, considered: Considered[L], rule: DecodeAdmission) -> DecodeLoad | None:
        """Of the least loaded of a few decode workers, the prompt included; None where the rule is
        off, nothing was measured, or a worker was found that serves the prompt alone.
        """
        pool, query = self._fleet.pool(Role.DECODE), considered.query
        if rule == "off" or considered.local.placement is not None or not pool.workers:
            return None
        then = None
        if rule == "predicted":
            after_s = sum(query.expected_s(considered.decision.worker_id))
            then = Then(after_s, self.queued.due_share(query.now_s + after_s))
        decode = self._decode_query(pool, query.tokens, query.tokens, "", self._closed(pool, ()))
        loads = [decode.load(worker, then) for worker in sample(decode, _DECODE_LOOKS)]
        return min((load for load in loads if load is not None), default=None)

    def decode_load_at(self, worker: WorkerId, context_tokens: int) -> DecodeLoad | None:
        """What a sequence would find at that decode worker now; None where that is not known."""
        pool = self._fleet.pool(Role.DECODE)
        if worker not in pool.views:
            return None
        query = self._decode_query(pool, context_tokens, context_tokens, "", frozenset())
        return query.load(worker, None)

    def for_decode(
        self,
        context_tokens: int,
        total_tokens: int,
        failed: set[Incarnation],
        *,
        kv_address: str = "",
    ) -> Placement[L]:
        """A decode worker for a sequence of so many tokens that may grow to `total_tokens`.

        `kv_address` is that of the worker that has its KV. Raises NoWorkers.
        """
        pool = self._pool(Role.DECODE)
        closed = self._closed(pool, failed)
        query = self._decode_query(pool, context_tokens, total_tokens, kv_address, closed)
        return self._decode_placement(query, context_tokens)

    def for_move(
        self, context_tokens: int, total_tokens: int, source: Incarnation, to: WorkerId | None
    ) -> Placement[L]:
        """Another decode worker than `source`, `to` (ejected or not) or any. Raises NoWorkers."""
        pool = self._fleet.pool(Role.DECODE)
        closed = pool.named((source,))
        if to is not None:
            closed |= frozenset(pool.workers) - {to}
        elif len(closed) < len(pool.workers):
            closed = self._closed(pool, (source,))
        if len(closed) == len(pool.workers):
            raise NoWorkers(f"no other decode worker {to or ''} is ready".replace("  ", " "))
        query = self._decode_query(pool, context_tokens, total_tokens, "", closed)
        return self._decode_placement(query, context_tokens)

    def has_prefill(self, excluding: set[Incarnation]) -> bool:
        """Whether a prefill worker is routable beside these."""
        pool = self._fleet.pool(Role.PREFILL)
        return len(pool.named(excluding)) < len(pool.workers)

    def has_decode(self, excluding: set[Incarnation]) -> bool:
        """Whether a decode worker is routable beside these."""
        pool = self._fleet.pool(Role.DECODE)
        return len(pool.named(excluding)) < len(pool.workers)

    def explain(
        self, tokens: Sequence[int], cache_salt: str, total_tokens: int, *, local: bool
    ) -> Explained:
        """Where such a prompt would be prefilled and decoded now; `local`: one worker may do both.
        Raises NoWorkers.
        """
        considered = self.consider(tokens, cache_salt, local_total=total_tokens if local else None)
        verdict, placement = considered.local.verdict, considered.local.placement
        if placement is not None:
            return Explained(placement.decision, placement.decision, verdict)
        prefill = considered.decision
        owner = self._fleet.link(Role.PREFILL, prefill.worker_id)
        address = owner.view.hello.peer_address if owner.view is not None else ""
        pool = self._pool(Role.DECODE)
        closed = self._closed(pool, ())
        query = self._decode_query(pool, len(tokens), total_tokens, address, closed)
        return Explained(prefill, self._policies.decode.choose(query), verdict)

    # -- queries --------------------------------------------------------------------------------

    def _prefill_query(
        self, tokens: int, failed: Collection[Incarnation], hashes: Sequence[BlockHash]
    ) -> PrefillPoolQuery:
        pool = self._pool(Role.PREFILL)
        return PrefillPoolQuery(
            pool,
            self._known,
            self._clock.now_s(),
            tokens=tokens,
            hashes=hashes,
            closed=self._closed(pool, failed),
        )

    def _hashes_of(self, tokens: Sequence[int], cache_salt: str) -> list[BlockHash]:
        return _hashes(self._pool(Role.PREFILL), tokens, cache_salt)

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
            kv_domain=self._fleet.everyone.domain_at(kv_address) if kv_address else "",
            closed=closed,
        )

    def _decode_placement(self, query: DecodePoolQuery, context_tokens: int) -> Placement[L]:
        decision = self._policies.decode.choose(query)
        self._policies.decode.placed(query, decision)
        link = self._fleet.link(Role.DECODE, decision.worker_id)
        self._placed(Role.DECODE, decision.worker_id, query.now_s)
        return Placement(link=link, decision=decision, load_tokens=context_tokens)

    def _closed(self, pool: Pool, failed: Collection[Incarnation]) -> frozenset[WorkerId]:
        """The failed and the ejected ones; when that is everybody, the failed ones; when that is,
        too, nobody.
        """
        shut = self._outliers.shut(self._clock.now_s())
        if not failed and not shut:
            return frozenset()
        known = pool.named(failed)
        for closed in (known | pool.named(shut), known):
            if len(closed) < len(pool.workers):
                return closed
        return frozenset()

    def _placed(self, role: Role, worker: WorkerId, now_s: float) -> None:
        """It may be the probe of an ejected worker."""
        self._outliers.placed(self._fleet.pool(role).views[worker].hello.incarnation, now_s)

    def _pool(self, role: Role) -> Pool:
        pool = self._fleet.pool(role)
        if not pool.workers:
            raise NoWorkers(f"no {role} worker is ready; try again, or see `baton status`")
        return pool


def _ways(query: DecodeCacheQuery) -> Iterator[Beside]:
    drawn = sample(query, _LOCAL_LOOKS)
    for worker in dict.fromkeys(chain(query.holders(_LOCAL_HOLDERS), drawn)):
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


def _hashes(pool: Pool, tokens: Sequence[int], cache_salt: str) -> list[BlockHash]:
    """Block hashes of a prompt, in the block size all workers of the model share."""
    hello = pool.views[pool.workers[0]].hello
    return chain_hashes(tokens, hello.layout.block_size, root_hash(hello.model_id, cache_salt))


def _queued(query: PrefillPoolQuery, decision: Decision) -> QueuedPrompt:
    queue_s, work_s = query.expected_s(decision.worker_id)
    return QueuedPrompt(
        worker_id=decision.worker_id,
        tokens=query.tokens,
        hashes=query.hashes,
        block_size=query.block_size,
        candidates=tuple(scored.worker_id for scored in decision.candidates),
        queue_s=queue_s,
        work_s=work_s,
        submitted_at_s=query.now_s,
    )
