"""From pools and views to a placement: the queries the policies ask, and what a choice means."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from core.ids import BlockHash, Incarnation, WorkerId
from core.messages import PrefixSource
from router.coming import Coming, blocks_per_step, steps_of
from router.curves import Curves, PrefillCurve, Speed, peak_tokens
from router.decode_load import DecodeLoad, Decoding, Pace, Then, load_now, load_then
from router.index import Level, PrefixIndex
from router.policies.base import Slo
from router.pool import Pool
from router.view import WorkerView

_SOURCES = 4
_ENOUGH_ANSWERS = 3
_SAME_SPEED = 1.2
"""Curves of equal devices are learned apart where their arenas differ, and never quite agree."""
_RESERVE = 0.03
"""Share of an arena that a predicted peak leaves free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What all decisions of one router draw on."""

    index: PrefixIndex
    curves: Curves
    slo: Slo
    step_s: float | None = None
    """What workers let a step take that computes part of a prompt beside answers."""
    local_decode: bool = True
    """Answers may run at prefill workers."""
    random: Random
    coming: Coming = field(default_factory=Coming)


class PoolQuery:
    """The part of router.policies.base.Query that both roles share."""

    def __init__(
        self, pool: Pool, known: Knowledge, now_s: float, closed: frozenset[WorkerId]
    ) -> None:
        self.pool = pool.workers
        self.random = known.random
        self.slo = known.slo
        self.now_s = now_s
        self._members = pool
        self._views = pool.views
        self._known = known
        self._closed = closed

    def is_open(self, worker: WorkerId) -> bool:
        return worker not in self._closed

    def sequences(self, worker: WorkerId) -> int:
        return self._views[worker].sequences


class PrefillPoolQuery(PoolQuery):
    """Implements router.policies.base.PrefillQuery."""

    def __init__(
        self,
        pool: Pool,
        known: Knowledge,
        now_s: float,
        *,
        tokens: int,
        hashes: Sequence[BlockHash],
        closed: frozenset[WorkerId] = frozenset(),
    ) -> None:
        super().__init__(pool, known, now_s, closed)
        self.tokens = tokens
        self.hashes = hashes
        self.block_size = self._views[self.pool[0]].hello.layout.block_size
        self._mask = pool.mask(known.index)
        for worker in closed:
            self._mask &= ~self._views[worker].holdings.bit
        self._levels: list[Level] | None = None
        self._steps: Sequence[BlockHash] | None = None

    def holders(self, limit: int) -> list[WorkerId]:
        index, found = self._known.index, list[WorkerId]()
        self._levels = index.levels(self.hashes, self._mask, limit)
        start = int(self.random.random() * self._mask.bit_length())
        for level in self._levels:
            found += index.pick(level.mask, limit - len(found), start)
        return found

    def cached_tokens(self, worker: WorkerId) -> int:
        bit, levels = self._views[worker].holdings.bit, self._levels
        if levels is None:
            levels = self._levels = self._known.index.levels(self.hashes, self._mask, 1)
        for blocks, mask in levels:
            if mask & bit:
                return self._usable(blocks)
        most = levels[-1].blocks if levels else 0
        return self._usable(self._known.index.longest(self.hashes, bit, most)[0])

    def _usable(self, blocks: int) -> int:
        """The last token is always computed."""
        tokens = blocks * self.block_size
        return tokens if tokens < self.tokens else self.tokens - 1

    def queued_tokens(self, worker: WorkerId) -> int:
        return self._views[worker].queued_tokens

    def ttft_s(self, worker: WorkerId) -> tuple[float, float]:
        return self._seconds(worker, self.cached_tokens(worker))

    def coming(self, limit: int) -> list[WorkerId]:
        found = self._known.coming.longest(self._noted_steps(), limit)
        return [worker for worker in found if worker in self._views and self.is_open(worker)]

    def expected_s(self, worker: WorkerId) -> tuple[float, float]:
        return self._seconds(worker, self._expected_tokens(worker))

    def fastest_s(self, workers: Sequence[WorkerId]) -> list[float]:
        if len(self._members.kinds) == 1:
            return []
        curves = [self._curve(self._views[worker]) for worker in workers]
        whole_s = [curve.seconds(0, self.tokens) for curve in curves]
        if max(whole_s) <= _SAME_SPEED * min(whole_s):
            return []
        fastest = curves[whole_s.index(min(whole_s))]
        return [fastest.seconds(self._expected_tokens(w), self.tokens) for w in workers]

    def _expected_tokens(self, worker: WorkerId) -> int:
        """Cached there once the prompts on their way are computed."""
        cached = self.cached_tokens(worker)
        noted, blocks = self._noted_steps(), blocks_per_step(self.block_size)
        if len(noted) * blocks * self.block_size > cached:  # else what comes is there already
            steps = self._known.coming.steps_at(worker, noted)
            cached = max(cached, self._usable(steps * blocks)) if steps else cached
        return cached

    def _curve(self, view: WorkerView) -> PrefillCurve:
        return self._known.curves.of(view.kind).prefill

    def _noted_steps(self) -> Sequence[BlockHash]:
        """What of the prompt is on its way to any worker."""
        if self._steps is None:
            self._steps = self._known.coming.noted(steps_of(self.hashes, self.block_size))
        return self._steps

    def _seconds(self, worker: WorkerId, cached: int) -> tuple[float, float]:
        view = self._views[worker]
        load, may_stay = view.load, self._known.local_decode
        if load is not None and load.decoding and may_stay and not view.is_colocated:
            there = self._beside(view, cached)
            return there.queue_s, there.work_s
        curve = self._curve(view)
        work_s = curve.seconds(cached, self.tokens, view.hello.chunk_tokens)
        return view.queued_tokens * curve.queue_token_s(view.queue_step_tokens), work_s

    def beside(self, worker: WorkerId) -> "Beside":
        """What awaits the prompt there, and the answers that it would run beside."""
        return self._beside(self._views[worker], self.cached_tokens(worker))

    def _beside(self, view: WorkerView, cached: int) -> "Beside":
        speed = self._known.curves.of(view.kind)
        curve = speed.prefill
        queued, decode_s = self._before(view, speed)
        beside_s = speed.beside * decode_s
        bound_s, tokens, most = self._known.step_s, self.tokens, view.hello.chunk_tokens
        chunk = curve.chunk_tokens(bound_s, beside_s, cached, tokens, most)
        steps, queued_steps = -(-(tokens - cached) // chunk), 0.0
        if queued:
            if (shared := view.queue_step_tokens) != most:
                chunk = curve.chunk_tokens(bound_s, beside_s, cached, tokens, shared)
            queued_steps = queued / chunk
        step_s = beside_s + curve.step_s
        work_s = curve.work_s(cached, self.tokens) + steps * step_s
        queue_s = queued * curve.queue_work_s + queued_steps * step_s
        return Beside(
            worker_id=view.hello.worker_id,
            queue_s=queue_s,
            work_s=work_s,
            decode_s=decode_s,
            delay_s=queue_s + work_s - (steps + queued_steps) * decode_s,
            chunk_steps=steps + queued_steps,
        )

    def _before(self, view: WorkerView, speed: Speed) -> tuple[int, float]:
        """Prompt tokens that wait there, and what a step of the answers there takes, this one
        included; 0 where none runs.
        """
        load = view.load
        if load is None or not load.decoding:
            return view.queued_tokens, 0.0
        tokens = load.decoding_tokens + self.tokens
        return view.queued_tokens, speed.decode.seconds(load.decoding + 1, tokens)

    def is_colocated(self, worker: WorkerId) -> bool:
        """Whether a prompt that is computed there is answered there."""
        return self._views[worker].is_colocated

    def measured(self, worker: WorkerId) -> bool:
        """Whether the seconds predicted for it rest on what such workers have taken."""
        return self._known.curves.measured(self._views[worker].kind)

    def source(
        self, chosen: WorkerId, everyone: Pool, failed: Collection[Incarnation]
    ) -> PrefixSource | None:
        """Who of `everyone`, of any role, holds more of the prompt than `chosen`: the longest
        prefix; of a few equals one in the same network domain, then with the fewest sequences.
        """
        here = self.cached_tokens(chosen)
        wanted = min(len(self.hashes), (self.tokens - 1) // self.block_size)
        index, mask = self._known.index, everyone.mask(self._known.index)
        for worker in everyone.named(failed):
            mask &= ~everyone.views[worker].holdings.bit
        least = here // self.block_size + 1
        if least > wanted or not index.holders(self.hashes[least - 1]) & mask:
            return None
        blocks, longest = index.longest(self.hashes, mask, wanted)
        start = int(self.random.random() * mask.bit_length())
        some = index.pick(longest, _SOURCES, start)
        domain = self._views[chosen].domain
        holders = [everyone.views[worker] for worker in some]
        best = min(holders, key=lambda view: (view.domain != domain, *_busy(view))).hello
        return PrefixSource(
            worker_id=best.worker_id,
            address=best.peer_address,
            incarnation=best.incarnation,
            num_blocks=blocks,
        )


class DecodeCacheQuery(PrefillPoolQuery):
    """Of decode workers that may compute a prompt themselves. What was submitted there and is in no
    report yet is mostly hand-offs, which are load but no prefill to wait for.
    """

    def _before(self, view: WorkerView, speed: Speed) -> tuple[int, float]:
        """Whoever is on its way there will run there, too."""
        decode_s, load = 0.0, view.load
        if sequences := view.sequences:
            context_tokens = view.unseen_tokens + (load.context_tokens if load is not None else 0)
            decode_s = speed.decode.seconds(sequences + 1, context_tokens + self.tokens)
        return view.queued_tokens, decode_s


class Beside(NamedTuple):
    """A prompt at a worker that decodes as well."""

    worker_id: WorkerId
    queue_s: float
    """Of the prompts before it, with the decodes in their steps."""
    work_s: float
    """Of its own uncached tokens, likewise."""
    decode_s: float
    """A step of the answers there without any chunk, this one included; 0 where none runs."""
    delay_s: float
    """What the chunks of all these prompts add to such steps."""
    chunk_steps: float
    """Steps that have one."""

    @property
    def first_token_s(self) -> float:
        return self.queue_s + self.work_s

    def mean_step_s(self, steps_to_go: int) -> float:
        """Of an answer there, over the steps it has still to go or those with a chunk."""
        return self.decode_s + self.delay_s / max(1.0, self.chunk_steps, steps_to_go)


def _busy(view: WorkerView) -> tuple[int, WorkerId]:
    return view.sequences, view.hello.worker_id


class DecodePoolQuery(PoolQuery):
    """Implements router.policies.base.DecodeQuery. `kv_domain`: the network domain its KV is in."""

    def __init__(
        self,
        pool: Pool,
        known: Knowledge,
        now_s: float,
        *,
        tokens: int,
        max_tokens: int,
        kv_domain: str = "",
        closed: frozenset[WorkerId] = frozenset(),
    ) -> None:
        super().__init__(pool, known, now_s, closed)
        self._tokens = tokens
        self._max_tokens = max_tokens
        self.near: tuple[WorkerId, ...] = pool.near(kv_domain) if kv_domain else ()

    def context_tokens(self, worker: WorkerId) -> int:
        view = self._views[worker]
        load = view.load
        return view.unseen_tokens + (load.context_tokens if load is not None else 0)

    def free_tokens(self, worker: WorkerId) -> int:
        view = self._views[worker]
        load = view.load
        free_blocks = load.free_blocks if load is not None else 0
        return free_blocks * view.hello.layout.block_size - view.unseen_tokens

    def fits(self, worker: WorkerId) -> bool:
        """Before enough answers have ended to predict from, the worst case must fit."""
        residuals = self._known.curves.residuals
        if not residuals:
            return self.free_tokens(worker) >= self._max_tokens
        hello = self._views[worker].hello
        arena_tokens = hello.num_blocks * hello.layout.block_size
        free_tokens, there = self.free_tokens(worker), self.context_tokens(worker)
        if free_tokens < self._tokens:
            return False
        # What leases keep is in no context, and not free either.
        room = min((1 - _RESERVE) * arena_tokens, free_tokens + there)
        context_tokens, sequences = there + self._tokens, self.sequences(worker) + 1
        if context_tokens + sequences * residuals[0] <= room:
            return True  # even if all of them were to go on as long as the longest
        return peak_tokens(context_tokens, sequences, residuals) <= room

    def load(self, worker: WorkerId, then: Then | None) -> DecodeLoad | None:
        """What the sequence would find there then, or now; None before steps of such workers were
        measured.
        """
        view = self._views[worker]
        speed, load, room = self._known.curves.of(view.kind), view.load, view.hello
        if load is None or speed.decode_fit.observed < _ENOUGH_ANSWERS:
            return None
        there = Decoding(
            running=load.running,
            coming=load.waiting + view.unseen_submits,
            context_tokens=self.context_tokens(worker),
            room_tokens=int((1 - _RESERVE) * room.num_blocks * room.layout.block_size),
        )
        pace = Pace(speed.decode, self._known.curves.residuals, self.slo.tpot_s)
        if then is None:
            return load_now(there, self._tokens, pace)
        return load_then(there, self._tokens, pace, then)

    def tpot_s(self, worker: WorkerId) -> float:
        curve = self._known.curves.of(self._views[worker].kind).decode
        context_tokens = self.context_tokens(worker) + self._tokens
        return curve.seconds(self.sequences(worker) + 1, context_tokens)
