"""Which of the fleet's workers an attempt goes to, from what is connected now."""

from collections.abc import Collection, Sequence
from random import Random
from typing import Generic

from core.clock import Clock
from core.errors import NoWorkers
from core.ids import BlockHash, Incarnation, Role, WorkerId
from router.alone import Alone
from router.config import DecodeAdmission
from router.curves import Curves
from router.decode_load import DecodeLoad, Then
from router.learning import Learning
from router.local import LocalVerdict
from router.members import L, Members
from router.outliers import NO_OUTLIERS, Outliers
from router.place import DecodePoolQuery, Knowledge, PrefillPoolQuery
from router.placement import Considered, Explained, Placement
from router.policies.base import Decision, Scored, sample
from router.policies.build import Policies
from router.queries import Queries
from router.queued import QueuedPrompt, QueuedPrompts
from router.types import Shut
from router.watcher import Unwatched

_DECODE_LOOKS = 8


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
        self._fleet = fleet
        self._policies = policies
        known = Knowledge(
            index=fleet.index,
            curves=Curves(),
            slo=policies.slo,
            step_s=policies.step_s,
            local_decode=policies.local_decode,
            random=random,
        )
        outliers = outliers or Outliers(NO_OUTLIERS, Unwatched())
        self._ask = Queries(fleet, known, outliers, clock)
        self._alone = Alone(self._ask)
        self.learning = Learning(fleet, known, outliers, clock)
        self.queued = QueuedPrompts(known.coming)
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
        hashes = self._ask.hashes_of(tokens, cache_salt) if hashes is None else hashes
        query = self._ask.prefill(len(tokens), failed, hashes)
        decision = self._policies.prefill.choose(query)
        if local_total is None:
            return Considered(query, decision)
        return Considered(query, decision, self._alone.find(query, decision, local_total))

    def place(
        self, considered: Considered[L], failed: Collection[Incarnation] = ()
    ) -> Placement[L]:
        """The prompt will be submitted where it was considered, without an `await` in between, and
        read nothing from the `failed`.
        """
        query, decision = considered.query, considered.decision
        self._policies.prefill.placed(query, decision)
        chosen = decision.worker_id
        self._ask.placed(Role.PREFILL, chosen, query.now_s)
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
        hashes = self._ask.hashes_of(tokens, cache_salt) if hashes is None else hashes
        query = self._ask.prefill(len(tokens), failed, hashes)
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
        return self._ask.prefill(1, (), ()).expected_s(worker)[0]

    def idle_work_s(self, prompt: QueuedPrompt) -> dict[WorkerId, float]:
        """Seconds of work the prompt is at those other candidates of it that have no queue."""
        views = self._fleet.pool(Role.PREFILL).views
        others = (worker for worker in prompt.candidates if worker != prompt.worker_id)
        idle = [w for w in others if w in views and views[w].queued_tokens <= 0]
        if not idle:  # the most frequent answer, to a question asked of whole queues
            return {}
        query = self._ask.prefill(prompt.tokens, (), prompt.hashes)
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
        self._ask.placed(role, placement.decision.worker_id, considered.query.now_s)
        return placement

    def decode_load(self, considered: Considered[L], rule: DecodeAdmission) -> DecodeLoad | None:
        """Of the least loaded of a few decode workers, the prompt included; None where the rule is
        off, nothing was measured, or a worker was found that serves the prompt alone.
        """
        pool, query = self._fleet.pool(Role.DECODE), considered.query
        if rule == "off" or considered.is_alone or not pool.workers:
            return None
        then = None
        if rule == "predicted":
            after_s = sum(query.expected_s(considered.decision.worker_id))
            then = Then(after_s, self.queued.due_share(query.now_s + after_s))
        decode = self._ask.decode(pool, query.tokens, query.tokens, closed=self._ask.closed(pool))
        loads = [decode.load(worker, then) for worker in sample(decode, _DECODE_LOOKS)]
        return min((load for load in loads if load is not None), default=None)

    def decode_load_at(self, worker: WorkerId, context_tokens: int) -> DecodeLoad | None:
        """What a sequence would find at that decode worker now; None where that is not known."""
        pool = self._fleet.pool(Role.DECODE)
        if worker not in pool.views:
            return None
        return self._ask.decode(pool, context_tokens, context_tokens).load(worker, None)

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
        pool = self._ask.pool(Role.DECODE)
        closed = self._ask.closed(pool, failed)
        query = self._ask.decode(
            pool, context_tokens, total_tokens, kv_address=kv_address, closed=closed
        )
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
            closed = self._ask.closed(pool, (source,))
        if len(closed) == len(pool.workers):
            raise NoWorkers(f"no other decode worker {to or ''} is ready".replace("  ", " "))
        query = self._ask.decode(pool, context_tokens, total_tokens, closed=closed)
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
        pool = self._ask.pool(Role.DECODE)
        query = self._ask.decode(
            pool, len(tokens), total_tokens, kv_address=address, closed=self._ask.closed(pool)
        )
        return Explained(prefill, self._policies.decode.choose(query), verdict)

    def _decode_placement(self, query: DecodePoolQuery, context_tokens: int) -> Placement[L]:
        decision = self._policies.decode.choose(query)
        self._policies.decode.placed(query, decision)
        link = self._fleet.link(Role.DECODE, decision.worker_id)
        self._ask.placed(Role.DECODE, decision.worker_id, query.now_s)
        return Placement(link=link, decision=decision, load_tokens=context_tokens)


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
