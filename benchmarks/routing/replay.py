"""One replay: a trace through simulated prefill workers, placed by the router's own policies.

Policies, index, views and queries are the router's, unchanged; only workers and time are simulated.
KV events reach the index when a prompt is done; load reports reach the views before every decision,
or every `stale_s` to several routers that each see only their own submits in between.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from benchmarks.routing.traces import Prompt
from benchmarks.routing.worker import Job, Worker
from core.ids import Incarnation, ModelId, Role, WorkerId
from core.kv import KvLayout
from core.messages import KvSnapshot, LoadReport, WorkerHello
from router.coming import steps_of
from router.curves import Curves, PrefillCurve
from router.index import Holdings, PrefixIndex
from router.place import Knowledge, PrefillPoolQuery
from router.policies.base import PrefillPolicy, Slo
from router.policies.baton import Baton
from router.policies.dualmap import DualMap
from router.policies.rebalance import Waiting, choose_moves
from router.pool import Pool
from router.view import WorkerView

ASCEND = PrefillCurve(0.0, 1.6e-4, 0.0)
"""DualMap's figure for Qwen2.5-7B on an Ascend 910B4."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What is simulated. `moves`: queued prompts may move among their candidates (rebalance.py).
    `joins` more workers, empty ones, come at `join_s`.
    """

    workers: int
    block_size: int
    cache_tokens: int
    ttft_s: float = 5.0
    curve: PrefillCurve = ASCEND
    warm_up: int = 500
    moves: bool = False
    routers: int = 1
    stale_s: float = 0.0
    joins: int = 0
    join_s: float = 0.0

    def rate_at(self, load: float, prompts: Sequence[Prompt]) -> float:
        """In times of the prompts' own: where they are `load` of what the workers can compute,
        without any cache.
        """
        work_s = sum(self.curve.seconds(0, prompt.tokens) for prompt in prompts)
        return load * self.workers * prompts[-1].at_s / work_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of the prompts after the warm-up."""

    within_slo: float
    hit_rate: float
    """Share of tokens."""
    imbalance: float
    """Greatest by mean seconds of prefill."""
    moved: int


class _Router:
    """One router's views and policy over all workers."""

    def __init__(
        self, world: World, holdings: Sequence[Holdings], index: PrefixIndex, policy: PrefillPolicy
    ) -> None:
        self.policy = policy
        self.block_size = world.block_size
        self.known = Knowledge(
            index=index,
            curves=Curves(),
            slo=Slo(ttft_s=world.ttft_s, tpot_s=1.0),
            random=Random(0),
        )
        self.views = [WorkerView(_hello(world, i), own) for i, own in enumerate(holdings)]
        for view in self.views:
            self.known.curves.set_prefill(view.kind, world.curve)
        self.take_in(world.workers)
        self.sent = [0] * len(self.views)

    def take_in(self, workers: int) -> None:
        """So many, of those there will ever be, are the pool from now on."""
        self.pool = Pool({view.hello.worker_id: view for view in self.views[:workers]})

    def submitted(self, i: int, job: Job) -> None:
        """Worker `i` has the job."""
        view, steps = self.views[i], steps_of(job.prompt.hashes, self.block_size)
        self.sent[i] += 1
        view.submitted(self.sent[i], job.prompt.tokens, job.uncached)
        self.known.coming.add(view.hello.worker_id, steps)

    def over(self, i: int, job: Job) -> None:
        """The job has ended there, or has left."""
        steps = steps_of(job.prompt.hashes, self.block_size)
        self.known.coming.drop(self.views[i].hello.worker_id, steps)

    def query(self, prompt: Prompt, now_s: float) -> PrefillPoolQuery:
        return PrefillPoolQuery(
            self.pool, self.known, now_s, tokens=prompt.tokens, hashes=prompt.hashes
        )


class Replay:
    """One run; `run` is called once, then `done` holds what became of each prompt."""

    def __init__(
        self, world: World, policy: Callable[[], PrefillPolicy], seed: int, rate: float
    ) -> None:
        self._world = world
        self._rate = rate
        self._random = Random(seed)
        self._workers = [
            Worker(world.block_size, world.cache_tokens, world.curve)
            for _ in range(world.workers + world.joins)
        ]
        index = PrefixIndex()
        names = [_hello(world, i).worker_id for i in range(len(self._workers))]
        holdings = [index.join(name) for name in names]
        self._numbers = {name: i for i, name in enumerate(names)}
        self._routers = [_Router(world, holdings, index, policy()) for _ in range(world.routers)]
        for view in self._routers[0].views:
            view.apply_snapshot(KvSnapshot(next_number=1))
        for router in self._routers:
            router.known.random.seed(self._random.random())
        self._ends: list[tuple[float, int]] = []
        self._reported_s = -1e9
        self.done: list[Job] = []
        self._joined = not world.joins
        self._owners: dict[int, _Router] = {}
        self._moved = 0

    def run(self, prompts: Sequence[Prompt]) -> Outcome:
        before: list[float] = []
        for number, prompt in enumerate(prompts):
            now_s = prompt.at_s / self._rate
            self._advance(now_s)
            if number == self._world.warm_up:
                before = [worker.work_s for worker in self._workers]
            self._place(prompt, now_s)
        self._advance(float("inf"))
        warm_s = prompts[self._world.warm_up].at_s / self._rate
        jobs = [job for job in self.done if job.at_s >= warm_s]
        loads = [w.work_s - b for w, b in zip(self._workers, before, strict=True)]
        ttfts = [job.ends_s - job.at_s for job in jobs]
        return Outcome(
            within_slo=sum(ttft <= self._world.ttft_s for ttft in ttfts) / len(jobs),
            hit_rate=sum(job.hit_tokens for job in jobs) / sum(job.prompt.tokens for job in jobs),
            imbalance=max(loads) * len(loads) / max(1e-9, sum(loads)),
            moved=self._moved,
        )

    def _advance(self, now_s: float) -> None:
        """Everything that ends by then ends, in order of time."""
        while self._ends and self._ends[0][0] <= now_s:
            ended_s, i = heapq.heappop(self._ends)
            job, events = self._workers[i].finish()
            self.done.append(job)
            self._owners.pop(id(job)).over(i, job)
            self._routers[0].views[i].apply_events(events)
            if self._workers[i].begin(ended_s):
                self._note_end(i)

    def _place(self, prompt: Prompt, now_s: float) -> None:
        self._join(now_s)
        self._report(now_s)
        router = self._routers[self._random.randrange(len(self._routers))]
        query = router.query(prompt, now_s)
        decision = router.policy.choose(query)
        router.policy.placed(query, decision)
        i = self._numbers[decision.worker_id]
        others = [scored.worker_id for scored in decision.candidates]
        work_s = query.expected_s(decision.worker_id)[1]
        self._submit(router, i, Job(prompt, now_s, others, work_s=work_s), now_s)
        if self._world.moves and isinstance(router.policy, Baton | DualMap):
            self._rebalance(router, i, now_s)

    def _submit(self, router: _Router, i: int, job: Job, now_s: float) -> None:
        if self._workers[i].submit(job, now_s):
            self._note_end(i)
        self._owners[id(job)] = router
        router.submitted(i, job)

    def _note_end(self, i: int) -> None:
        running = self._workers[i].running
        if running is not None:
            heapq.heappush(self._ends, (running.ends_s, i))

    def _join(self, now_s: float) -> None:
        if not self._joined and now_s >= self._world.join_s:
            self._joined = True
            for router in self._routers:
                router.take_in(len(self._workers))

    def _report(self, now_s: float) -> None:
        if now_s - self._reported_s < self._world.stale_s:
            return
        self._reported_s = now_s
        for i, worker in enumerate(self._workers):
            load = LoadReport(
                last_submit=0,
                queued_tokens=worker.queued_tokens(now_s),
                waiting=len(worker.queue),
                running=int(worker.running is not None),
                context_tokens=0,
                free_blocks=0,
                total_blocks=0,
            )
            for router in self._routers:
                router.views[i].reported(replace(load, last_submit=router.sent[i]))

    def _rebalance(self, router: _Router, i: int, now_s: float) -> None:
        """Move prompts out of the queue just added to, if it has fallen behind."""
        source, token_s = self._workers[i], self._world.curve.queue_token_s()
        if source.queued_tokens(now_s) * token_s <= self._world.ttft_s:
            return
        loads_s = {
            name: self._workers[k].queued_tokens(now_s) * token_s
            for name, k in self._numbers.items()
            if k != i
        }
        queue_s = {name: s for name, s in loads_s.items() if s < self._world.ttft_s}
        if not queue_s:
            return
        waiting: list[Waiting] = []
        for job in source.queue:
            query = router.query(job.prompt, now_s)
            waiting.append(
                Waiting(
                    work_s=job.work_s,
                    elsewhere_s={w: query.expected_s(w)[1] for w in job.candidates if w in queue_s},
                    waited_s=now_s - job.at_s,
                )
            )
        moves = choose_moves(waiting, source.running_s(now_s), queue_s, self._world.ttft_s)
        moving = [(source.queue[move.position], move.to) for move in moves]
        for move, (job, to) in zip(moves, moving, strict=True):
            job.work_s = waiting[move.position].elsewhere_s[to]
            source.queue.remove(job)
            self._owners[id(job)].over(i, job)
            self._submit(router, self._numbers[to], job, now_s)
        self._moved += len(moving)


def _hello(world: World, i: int) -> WorkerHello:
    name = f"w{i:04d}"
    return WorkerHello(
        worker_id=WorkerId(name),
        incarnation=Incarnation(name),
        role=Role.PREFILL,
        epoch=1,
        model_id=ModelId("replay"),
        layout=KvLayout(
            block_size=world.block_size, num_kv_heads=1, num_layers=1, head_dim=1, dtype="uint8"
        ),
        num_blocks=world.cache_tokens // world.block_size,
        context_tokens=world.cache_tokens,
        peer_address="replay:1",
    )
