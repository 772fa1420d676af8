"""Prefixes from other workers' caches, as prefill_worker/prefix.py brings them.

    weigh (the worker's own Sources) -> fetch (or wait for one that brings the same) -> published
      fetch: the source leases what it has cached -> its bytes cross the links -> closing question

Whether a fetch pays is production's to say. It needs what prefills take: a cost fitted to steps of
the worker's latency model, as if it had run for a while; and what fetches take, fitted as live.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

from core.errors import TransferCause
from core.fit import PrefillCost
from core.ids import BlockHash, BlockId
from core.messages import PrefixSource
from engine.latency.base import StepShape
from kv_transfer.leases import Lease
from kv_transfer.messages import LeaseOutcome
from kv_transfer.metrics import transfer_cost
from prefill_worker.policy import FetchVerdict
from prefill_worker.sources import Sources, Wanted
from simulator.events import Events
from simulator.leases import Renewal
from simulator.links import Network, send
from simulator.sequence import ANY, ROOT, SimSequence
from simulator.worker import WorkerSpec

if TYPE_CHECKING:
    from simulator.fleet import Member

_STARTS = (0, 2_048, 16_384, 65_536)
_LONGEST_CHUNK = 8_192
_ROUNDS = 5


def fitted_cost(spec: WorkerSpec) -> PrefillCost:
    """The production fit, after steps of several sizes and histories."""
    chunk_tokens = min(spec.chunk_tokens or spec.step_tokens, spec.step_tokens)
    most = min(chunk_tokens, _LONGEST_CHUNK)
    cost = PrefillCost(chunk_tokens)
    sizes = {max(1, most // 4), max(1, most // 2), most}
    for start, tokens in [*product(_STARTS, sorted(sizes))] * _ROUNDS:
        chunk = (start, start + tokens)
        cost.add([chunk], spec.latency.step_s(StepShape([chunk])))
    return cost


@dataclass(slots=True)
class FetchCounts:
    """Of a whole run; tried = won + failed + cancelled."""

    tried: int = 0
    won: int = 0
    tokens: int = 0
    """Of prompts, brought by those won."""
    shared: int = 0
    """Prompts that waited for another's fetch of the same blocks."""
    failed: Counter[TransferCause | None] = field(default_factory=Counter)


class PrefixFetcher:
    """One worker's."""

    def __init__(
        self,
        *,
        events: Events,
        network: Network,
        member: "Member",
        cost: PrefillCost,
        counts: FetchCounts,
        control_s: float,
    ) -> None:
        self.events = events
        self.network = network
        self.member = member
        self.counts = counts
        self.control_s = control_s
        self.transfer = transfer_cost()
        spec = member.worker.spec
        self.sources = Sources(
            cost=cost,
            predict_s=self.transfer.predict,
            block_size=spec.block_size,
            block_bytes=spec.block_size * spec.kv_bytes_per_token,
            enabled=True,
            now_s=events.now_s(),
        )
        self.under_way: dict[BlockHash, list[Fetch]] = {}

    def bring(
        self,
        sequence: SimSequence,
        source: PrefixSource,
        owner: "Member",
        deadline_s: float,
        on_over: Callable[["Fetch"], None],
    ) -> "Fetch | None":
        """None where it does not pay; else `on_over` hears, once, that the prompt may be computed
        now.
        """
        fetch = Fetch(self, sequence, source, owner=owner, deadline_s=deadline_s, on_over=on_over)
        return fetch if fetch.look() else None


class Fetch:
    """One prompt's, from the first look to its end."""

    def __init__(
        self,
        fetcher: PrefixFetcher,
        sequence: SimSequence,
        source: PrefixSource,
        *,
        owner: "Member",
        deadline_s: float,
        on_over: Callable[["Fetch"], None],
    ) -> None:
        self._fetcher = fetcher
        self._sequence = sequence
        self._source = source
        self._owner = owner
        self._deadline_s = deadline_s
        self._on_over = on_over
        size = fetcher.member.worker.spec.block_size
        full = (sequence.context_tokens - 1) // size
        self._hashes: Sequence[BlockHash] = sequence.block_hashes(full, size)
        left = sequence.context_tokens - source.num_blocks * size
        self.left_tokens = max(1, left)
        """To compute afterwards."""
        self._key: BlockHash | None = None
        self._turn = 0
        self._until_s = self._began_s = self._arrives_s = 0.0
        self._lease: Lease | None = None
        self._reserved: tuple[list[BlockId], list[BlockId]] | None = None
        self.blocks: list[BlockId] = []
        """Held until the prompt has looked them up."""
        self.over = False

    # -- what to do now -------------------------------------------------------------------------

    def look(self) -> bool:
        """Begin, or wait for another that brings the same; False if neither pays."""
        fetcher, worker = self._fetcher, self._fetcher.member.worker
        now_s, cached = fetcher.events.now_s(), len(worker.pool.lookup(self._hashes))
        wanted = Wanted(
            context_tokens=self._sequence.context_tokens,
            blocks=len(self._hashes),
            cached_blocks=cached,
            remaining_s=self._deadline_s - now_s,
        )
        weighed = fetcher.sources.weigh(wanted, self._source, now_s)
        if weighed.verdict is not FetchVerdict.FETCH:
            return False
        self._turn += 1
        self._until_s = now_s + weighed.patience_s
        fetcher.events.at(self._until_s, Fetch._out_of_time, (self, self._turn))
        others = fetcher.under_way.get(self._hashes[cached])
        if others is not None:
            others.append(self)
            fetcher.counts.shared += 1
            return True
        self._key = self._hashes[cached]
        fetcher.under_way[self._key] = []
        fetcher.counts.tried += 1
        fetcher.events.at(now_s + fetcher.control_s, Fetch._asked, self)
        return True

    def _resume(self, *, again: bool) -> None:
        """Another's fetch of the same has ended."""
        if not self.over and not (again and self.look()):
            self._finish()

    @staticmethod
    def _out_of_time(waited: "tuple[Fetch, int]") -> None:
        self, turn = waited
        if self.over or turn != self._turn:
            return
        if self._key is None:
            self._finish()
        else:
            self._fail(None)

    # -- one fetch ------------------------------------------------------------------------------

    def _asked(self) -> None:
        """At the owner: what it has of the prompt, it holds."""
        fetcher, owner, me = self._fetcher, self._owner, self._fetcher.member
        if self.over or not self._in_reach():
            return
        reader = me.record.worker_id
        self._lease = lease = owner.leases.open_cached(ANY, self._hashes, reader)
        total = len(lease.blocks)
        if total <= len(me.worker.pool.lookup(self._hashes)):
            self._fail(TransferCause.NOT_HELD)
            return
        self._reserved = me.worker.reserve(self._hashes, total)
        if self._reserved is None:
            self._fail(TransferCause.NO_MEMORY)
            return
        freed = owner.worker.look
        Renewal(fetcher.events, owner.leases, lease, self._in_reach, freed).begin()
        spec = me.worker.spec
        nbytes = len(self._reserved[1]) * spec.block_size * spec.kv_bytes_per_token
        path = fetcher.network.path(owner.port, me.port)
        self._began_s = fetcher.events.now_s()
        self._arrives_s = send(path, self._began_s, nbytes)
        fetcher.events.at(self._arrives_s + fetcher.control_s, Fetch._close, self)

    def _close(self) -> None:
        """All bytes are here; if they were held until now they are what they should be. Out of
        reach there is no answer, and patience ends it.
        """
        fetcher, lease = self._fetcher, self._lease
        if self.over or lease is None or self._reserved is None or not self._in_reach():
            return
        member = fetcher.member
        outcome = self._owner.leases.close(lease.lease_id, member.record.worker_id)
        self._owner.worker.look()
        if outcome is not LeaseOutcome.HELD:
            self._fail(TransferCause.EXPIRED)
            return
        (cached, fresh), self._reserved = self._reserved, None
        pool, size = member.worker.pool, member.worker.spec.block_size
        pool.received(fresh)
        self.blocks = [*cached, *fresh]
        first, count = len(cached), len(self.blocks)
        parent = self._hashes[first - 1] if first else ROOT
        pool.publish(self.blocks, first, self._hashes[first:count], parent)
        member.worker.tell_kv()
        nbytes = len(fresh) * size * member.worker.spec.kv_bytes_per_token
        fetcher.transfer.add(nbytes, self._arrives_s - self._began_s)
        fetcher.sources.met(self._source.incarnation)
        fetcher.counts.won += 1
        fetcher.counts.tokens += len(fresh) * size
        self._finish()
        self._landed(again=True)

    def _in_reach(self) -> bool:
        now_s, me, owner = self._fetcher.events.now_s(), self._fetcher.member, self._owner
        cut_s = max(me.port.cut_until_s, owner.port.cut_until_s)
        return now_s >= cut_s and not owner.is_dead and not me.is_dead

    # -- its end --------------------------------------------------------------------------------

    def cancel(self) -> None:
        """The prompt is not to be computed here any more."""
        if self.over:
            return
        self.over = True
        self._give_back()
        self._landed(again=True)
        self._release()

    def _fail(self, cause: TransferCause | None) -> None:
        """The prompt is computed instead."""
        fetcher = self._fetcher
        fetcher.counts.failed[cause] += 1
        fetcher.sources.fell_short(self._source.incarnation, cause, fetcher.events.now_s())
        self._give_back()
        self._finish()
        self._landed(again=False)

    def _landed(self, *, again: bool) -> None:
        """Others that want the same look again, unless it would fail for each of them."""
        if self._key is None:
            return
        key, self._key = self._key, None
        self._fetcher.sources.ended(self._fetcher.events.now_s())
        for other in self._fetcher.under_way.pop(key):
            other._resume(again=again)

    def _finish(self) -> None:
        self.over = True
        self._on_over(self)
        self._release()

    def _release(self) -> None:
        blocks, self.blocks = self.blocks, []
        self._fetcher.member.worker.pool.release(blocks)

    def _give_back(self) -> None:
        if self._lease is not None:
            if self._owner.leases.abort(self._lease.lease_id) is not None:
                self._owner.worker.look()
            self._lease = None
        if self._reserved is None:
            return
        pool, events = self._fetcher.member.worker.pool, self._fetcher.events
        cached, fresh = self._reserved
        self._reserved = None
        pool.release(cached)
        if self._arrives_s <= events.now_s():
            pool.abandon(fresh)
            self._fetcher.member.queue.look()
        else:
            pool.quarantine(fresh)
            events.at(self._arrives_s, self._read_ended, fresh)

    def _read_ended(self, fresh: list[BlockId]) -> None:
        self._fetcher.member.worker.pool.release_quarantined(fresh)
        self._fetcher.member.queue.look()
        self._fetcher.member.worker.look()
