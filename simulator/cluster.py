"""A simulated cluster: built from its spec, run over requests, answering a record per request."""

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isnan
from random import Random

from core.fit import PrefillCost
from core.ids import WorkerId
from core.messages import KvRemoved, KvStored
from kv_transfer.leases import LeaseTable
from kv_transfer.metrics import LeaseCounters, LeaseEnd
from router.index import PrefixIndex
from simulator.clients import Clients, OpenClients, make_clients
from simulator.events import Events
from simulator.fleet import Member, SimFleet, make_hello, make_record
from simulator.handoff import PullQueue
from simulator.job import Record
from simulator.keep import Keeper
from simulator.links import Network
from simulator.pools import Pool, Sample, Slot
from simulator.prefix import FetchCounts, PrefixFetcher, fitted_cost
from simulator.router import SimRouter
from simulator.spec import Cut, Failure, PoolRole, PoolSpec, SimSpec
from simulator.worker import SimWorker
from simulator.workload.types import SimRequest

_PROGRESS_EVERY = 500
_JUST_S = 1e-6
"""A first token at the very end of its target is in time."""
_COLLECT_AFTER = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A run: records in order of arrival, samples by pool, and how large it was."""

    records: tuple[Record, ...]
    samples: dict[str, tuple[Sample, ...]]
    ended_s: float
    events: int
    busy_share: dict[str, float]
    """By pool: share of its workers' time that steps took, until the last request's arrival."""
    kv_moved_bytes: int
    preemptions: int
    prompts_moved: int = 0
    """Out of one prefill worker's queue to another's."""
    prefixes_fetched: int = 0
    fetched_tokens: int = 0
    """From other workers' caches, into those of prefill workers."""
    leases: LeaseCounters = field(default_factory=LeaseCounters)
    """Of all workers."""


class Cluster:
    """`run` is called once."""

    def __init__(self, spec: SimSpec) -> None:
        self._spec = spec
        self._events = Events()
        self._random = Random(spec.seed)
        self._network = Network(spec.network.uplink_bytes_per_s)
        self._index = PrefixIndex()
        self._records: list[Record] = []
        self._ended = 0
        self._on_progress: Callable[[int], None] = lambda done: None
        keeper = None if spec.keep is None else Keeper(self._events, spec.keep)
        self._routers = [
            SimRouter(
                spec,
                SimFleet(self._index, sees_truth=spec.report_s == 0),
                self._events,
                self._network,
                random=Random(self._random.random()),
                on_end=self._note_end,
                keeper=keeper,
            )
            for _ in range(spec.routers)
        ]
        self._enough: Callable[[Record], bool] | None = None
        self._late: Callable[[Record], bool] | None = None
        self._on_asked: Callable[[SimRequest], None] = lambda request: None
        self._stopped = False
        self._clients: Clients = OpenClients(())
        self._total = self._asked = 0
        self._busy: dict[str, float] = {}
        self._every_s = 0.0
        self._leases: list[LeaseTable] = []
        self._fetches = FetchCounts()
        self._costs: dict[str, PrefillCost] = {}
        self._pools = self._lay_out()

    def run(
        self,
        requests: Sequence[SimRequest],
        on_progress: Callable[[int], None] | None = None,
        *,
        enough: Callable[[Record], bool] | None = None,
        late: Callable[[Record], bool] | None = None,
        on_asked: Callable[[SimRequest], None] | None = None,
    ) -> Outcome:
        """All requests, to their end; or, asked of each record that is complete, until `enough`,
        or, of each that has no token when its TTFT target has passed, `late`. Of one that is asked
        again there is a record each time.

        `on_progress` hears how many have ended, `on_asked` of each request as it comes.
        """
        self._enough, self._late = enough, late
        self._on_asked = on_asked or self._on_asked
        self._on_progress = on_progress or self._on_progress
        spec, self._total = self._spec, len(requests)
        self._clients = make_clients(requests, closed=spec.closed_sessions, at_once=spec.sessions)
        horizon_s = requests[-1].at_s if requests else 0.0
        for failure in self._spec.failures:
            self._events.at(failure.at_s, self._fail, failure)
        for cut in self._spec.cuts:
            self._events.at(cut.at_s, self._cut, cut)
        self._next_arrival(None)
        self._every_s = horizon_s / max(1, self._spec.samples)
        if self._every_s > 0:
            self._events.at(self._every_s, self._sample, horizon_s)
        with _rare_collections():
            while self._ended < self._total and self._events.pending and not self._stopped:
                self._events.run_some(_PROGRESS_EVERY)
        return Outcome(
            records=tuple(sorted(self._records, key=_arrival)),
            samples={name: tuple(pool.samples) for name, pool in self._pools.items()},
            ended_s=self._events.now_s(),
            events=self._events.happened,
            busy_share=self._busy,
            kv_moved_bytes=sum(
                slot.port.received.carried_bytes for p in self._pools.values() for slot in p.slots
            ),
            preemptions=sum(pool.preemptions for pool in self._pools.values()),
            prefixes_fetched=self._fetches.won,
            fetched_tokens=self._fetches.tokens,
            leases=_sum_leases(self._leases),
            prompts_moved=sum(router.moves.moved for router in self._routers),
        )

    def now_s(self) -> float:
        """The virtual clock's."""
        return self._events.now_s()

    # -- building -------------------------------------------------------------------------------

    def _lay_out(self) -> dict[str, Pool]:
        pools: dict[str, Pool] = {}
        number, per_domain = 0, self._spec.network.domain_workers
        for pool in self._spec.pools:
            slots: list[Slot] = []
            for i in range(pool.workers):
                domain = number // per_domain if per_domain else 0
                port = self._network.port(domain, pool.worker.nic_bytes_per_s)
                slot = Slot(pool, f"{pool.name}-{i:05d}", domain, port)
                slots.append(slot)
                number += 1
                if pool.ready_s > 0:
                    self._events.at(pool.ready_s, self._add, slot)
                else:
                    self._add(slot)
            pools[pool.name] = Pool(pool, slots)
        return pools

    def _add(self, slot: Slot) -> None:
        """A new life, with an empty cache."""
        slot.life += 1
        queue = PullQueue()
        unheard: list[KvStored | KvRemoved] = []
        transfer = self._spec.transfer
        live = self._spec.report_s == 0

        def on_kv(events: Sequence[KvStored | KvRemoved]) -> None:
            unheard.extend(events)
            if live:
                member.tell()

        colocated = slot.pool.role is PoolRole.COLOCATED
        worker = SimWorker(
            WorkerId(slot.name),
            slot.pool.worker,
            self._events,
            on_kv=on_kv,
            on_space=queue.look,
            step_s=None if colocated else self._spec.router.step_s(self._spec.slo.tpot_s),
        )
        hello = make_hello(slot.name, slot.pool.role, worker, slot.domain, slot.life)
        holdings = self._index.join(hello.worker_id)
        holdings.gather(())
        holdings.swap()
        member = Member(
            record=make_record(hello),
            hello=hello,
            worker=worker,
            queue=queue,
            port=slot.port,
            pool=slot.pool.name,
            holdings=holdings,
            unheard=unheard,
            leases=LeaseTable(worker.pool, self._events, transfer.lease_s),
            is_colocated=colocated,
        )
        self._leases.append(member.leases)
        if transfer.fetch and slot.pool.role is PoolRole.PREFILL:
            member.fetcher = self._fetcher(member, slot.pool)
        slot.member = member
        for router in self._routers:
            router.fleet.join(member)
        if not live:
            first_s = self._random.random() * self._spec.report_s
            self._events.at(self._events.now_s() + first_s, self._report, slot)

    def _fetcher(self, member: Member, pool: PoolSpec) -> PrefixFetcher:
        cost = self._costs.get(pool.name)
        if cost is None:
            cost = self._costs[pool.name] = fitted_cost(pool.worker)
        return PrefixFetcher(
            events=self._events,
            network=self._network,
            member=member,
            cost=cost,
            counts=self._fetches,
            control_s=self._spec.network.control_s,
        )

    def _report(self, slot: Slot) -> None:
        """What a worker says now, all routers hear now; then nothing for a while."""
        member = slot.member
        if member is None or member.is_dead:
            return
        member.tell()
        for router in self._routers:
            router.fleet.link(member.hello.role, member.hello.worker_id).reported()
        self._events.at(self._events.now_s() + self._spec.report_s, self._report, slot)

    # -- requests -------------------------------------------------------------------------------

    def _next_arrival(self, request: SimRequest | None) -> None:
        """One arrival is on the heap at a time."""
        if request is not None:
            self._ask(request)
        coming = next(self._clients.coming, None)
        if coming is not None:
            self._events.at(coming.at_s, self._next_arrival, coming)

    def _ask(self, request: SimRequest) -> None:
        self._asked += 1
        self._on_asked(request)
        if self._asked == self._total:
            self._note_busy()
        routers = self._routers
        router = routers[0]
        if len(routers) > 1:
            router = routers[self._random.randrange(len(routers))]
        record = router.arrive(request)
        if self._late is not None:
            late_s = record.at_s + self._spec.slo.ttft_s + _JUST_S
            self._events.at(late_s, self._look_late, record)

    def _look_late(self, record: Record) -> None:
        waits = record.outcome == "unfinished" and isnan(record.first_s)
        if waits and self._late is not None and self._late(record):
            self._stopped = True

    def _note_end(self, record: Record) -> None:
        self._records.append(record)
        self._ended += 1
        following = self._clients.after(record, self._events.now_s())
        if following is not None:
            record.is_asked_again = following.is_same
            self._total += following.is_same
            self._events.at(following.request.at_s, self._ask, following.request)
        if self._enough is not None and self._enough(record):
            self._stopped = True
        if self._ended % _PROGRESS_EVERY == 0:
            self._on_progress(self._ended)

    # -- failures -------------------------------------------------------------------------------

    def _fail(self, failure: Failure) -> None:
        slot, now_s = self._pools[failure.pool].slots[failure.worker], self._events.now_s()
        if slot.die() is None:
            return
        noticed_s = self._spec.router.worker_silence_s if failure.silent else 0.0
        if failure.restart_s is not None:  # whose hello tells of it
            noticed_s = min(noticed_s, failure.restart_s)
        if noticed_s > 0:
            self._events.at(now_s + noticed_s, self._lose, slot)
        else:
            self._lose(slot)
        if failure.restart_s is not None:
            self._events.at(now_s + failure.restart_s, self._add, slot)

    def _lose(self, slot: Slot) -> None:
        """Routers hear that it is dead."""
        member, slot.member = slot.member, None
        if member is None:
            return
        for router in self._routers:
            router.fleet.leave(member.hello.worker_id)
        member.holdings.leave()
        for router in self._routers:
            router.lost(member)

    def _cut(self, cut: Cut) -> None:
        port = self._pools[cut.pool].slots[cut.worker].port
        port.cut_until_s = max(port.cut_until_s, self._events.now_s() + cut.for_s)

    # -- looking --------------------------------------------------------------------------------

    def _note_busy(self) -> None:
        """Utilisation until the last arrival, which is now."""
        now_s = max(1e-9, self._events.now_s())
        for name, pool in self._pools.items():
            self._busy[name] = pool.busy_s / now_s / max(1, len(pool.slots))

    def _sample(self, horizon_s: float) -> None:
        now_s = self._events.now_s()
        for pool in self._pools.values():
            pool.sample(now_s, self._every_s)
        coming = self._spec.closed_sessions and self._asked < self._total
        if coming or now_s + self._every_s <= horizon_s + 1e-9:
            self._events.at(now_s + self._every_s, self._sample, horizon_s)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """What a run makes lives as long as a request; to look for garbage as often as Python does by
    itself costs a tenth of the time.
    """
    before = gc.get_threshold()
    gc.set_threshold(_COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _sum_leases(tables: Sequence[LeaseTable]) -> LeaseCounters:
    counters = [table.counters for table in tables]
    return LeaseCounters(
        opened=sum(each.opened for each in counters),
        ended=sum((each.ended for each in counters), Counter[LeaseEnd]()),
    )


def _arrival(record: Record) -> float:
    return record.at_s
