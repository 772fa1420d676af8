"""Prefixes from other workers' caches: missing blocks of a prompt, read instead of computed.

    judge -> fetch (or wait for one that brings the same) -> publish -> the prefill finds them here

So a prefix that many prompts share spreads to the workers that need it, and nobody has to predict
what is hot (Mooncake, FAST'25, algorithm 1). A fetch that fails costs a bounded pause: then the
prompt is computed as if nobody had it.
"""

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field

from core.clock import Clock
from core.errors import DeadlineExceeded, TransferFailed
from core.fit import PrefillCost
from core.ids import BlockHash, BlockId
from core.messages import PrefixSource
from engine.pool import BlockPool
from engine.sequence import Sequence
from engine.types import EngineInfo
from kv_transfer.metrics import PullStats
from kv_transfer.reader import FetchedPrefix, FetchRequest, Reader
from prefill_worker.policy import FetchVerdict
from prefill_worker.sources import Sources, Wanted

log = logging.getLogger(__name__)

_BUG, _CANCELLED, _DEADLINE = "bug", "cancelled", "deadline"


@dataclass(slots=True)
class FetchCounters:
    """Since the process started; tried = won + failed + those under way."""

    tried: int = 0
    won: int = 0
    tokens: int = 0
    """Tokens of prompts brought by those won."""
    shared: int = 0
    """Prompts that waited for another's fetch of the same blocks."""
    failed: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """What a fetch left in the cache: positions [start, end) of the prompt, none when it failed.

    `blocks` are those of the prompt up to `end`, one running reference each, for the caller to
    release when the prefill has looked them up.
    """

    blocks: tuple[BlockId, ...] = ()
    start: int = 0
    end: int = 0
    seconds: float = 0.0
    stats: PullStats = field(default_factory=PullStats)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Fetch block `first` and what follows of a prompt's blocks."""

    hashes: list[BlockHash]
    first: int
    patience_s: float


class PrefixFetcher:
    """Called on the event loop. Owns no task: `bring` runs in that of its caller."""

    def __init__(
        self,
        *,
        info: EngineInfo,
        pool: BlockPool,
        reader: Reader,
        cost: PrefillCost,
        clock: Clock,
    ) -> None:
        self._layout = info.layout
        self._pool = pool
        self._reader = reader
        self._clock = clock
        self._sources = Sources(
            cost=cost,
            predict_s=reader.predict_s,
            block_size=info.layout.block_size,
            block_bytes=info.layout.block_bytes,
            enabled=reader.config.fetch,
            now_s=clock.now_s(),
        )
        self._under_way: dict[BlockHash, asyncio.Future[bool]] = {}
        self.counters = FetchCounters()

    def pays(self, sequence: Sequence, source: PrefixSource) -> bool:
        """Whether `bring` is worth a task now."""
        return self._plan(sequence, source) is not None

    async def bring(self, sequence: Sequence, root: BlockHash, source: PrefixSource) -> Brought:
        """Fetch what pays off and publish it. Raises nothing that a fetch may fail with."""
        began_s = self._clock.now_s()
        prefix: FetchedPrefix | None = None
        while (plan := self._plan(sequence, source)) is not None:
            other = self._under_way.get(plan.hashes[plan.first])
            if other is None:
                prefix = await self._fetch(sequence, source, plan)
                break
            self.counters.shared += 1
            done, _ = await asyncio.wait([other], timeout=plan.patience_s)
            if not done or not other.result():
                break
        seconds = self._clock.now_s() - began_s
        if prefix is None or plan is None:
            return Brought(seconds=seconds)
        size = self._layout.block_size
        return Brought(
            blocks=self._publish(prefix, root, plan.hashes),
            start=prefix.cached_blocks * size,
            end=len(prefix.blocks) * size,
            seconds=seconds,
            stats=prefix.stats,
        )

    def _plan(self, sequence: Sequence, source: PrefixSource) -> _Plan | None:
        """What to fetch now; counts why nothing."""
        size, now_s = self._layout.block_size, self._clock.now_s()
        hashes = sequence.block_hashes((sequence.context_tokens - 1) // size, size)
        cached = len(self._pool.lookup(hashes))
        wanted = Wanted(
            context_tokens=sequence.context_tokens,
            blocks=len(hashes),
            cached_blocks=cached,
            remaining_s=sequence.deadline_at_s - now_s,
        )
        weighed = self._sources.weigh(wanted, source, now_s)
        if weighed.verdict is not FetchVerdict.FETCH:
            self.counters.skipped[weighed.verdict] += 1
            return None
        return _Plan(hashes, cached, weighed.patience_s)

    async def _fetch(
        self, sequence: Sequence, source: PrefixSource, plan: _Plan
    ) -> FetchedPrefix | None:
        """One fetch, counted. Others that want the same first block wait for its end and look
        again, unless it failed: it would fail for each of them.
        """
        landed: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._under_way[plan.hashes[plan.first]] = landed
        self.counters.tried += 1
        failed, prefix = _BUG, None
        try:
            prefix = await self._reader.fetch(
                FetchRequest(
                    source=source,
                    sequence_id=sequence.sequence_id,
                    hashes=plan.hashes,
                    timeout_s=plan.patience_s,
                )
            )
            self._sources.met(source.incarnation)
        except TransferFailed as error:
            failed = error.cause
            self._fell_short(sequence, source, error)
        except DeadlineExceeded as error:
            failed = _DEADLINE
            self._fell_short(sequence, source, error)
        except asyncio.CancelledError:
            failed = _CANCELLED
            raise
        finally:
            self._sources.ended(self._clock.now_s())
            if prefix is None:
                self.counters.failed[failed] += 1
            del self._under_way[plan.hashes[plan.first]]
            landed.set_result(prefix is not None or failed == _CANCELLED)
        return prefix

    def _fell_short(
        self, sequence: Sequence, source: PrefixSource, error: TransferFailed | DeadlineExceeded
    ) -> None:
        """Log it, and leave a source alone for a while whose fault it may be."""
        log.info(
            "prefix_fetch_failed sequence=%s source=%s reason=%s",
            sequence.sequence_id,
            source.worker_id,
            error.message,
        )
        now_s = self._clock.now_s()
        if sequence.deadline_at_s > now_s:
            cause = error.cause if isinstance(error, TransferFailed) else None
            self._sources.fell_short(source.incarnation, cause, now_s)

    def _publish(
        self, prefix: FetchedPrefix, root: BlockHash, hashes: list[BlockHash]
    ) -> tuple[BlockId, ...]:
        """Offer the fresh blocks to the prefix cache, parents first; answers those to release."""
        blocks = list(prefix.blocks)
        first = prefix.cached_blocks
        parent = hashes[first - 1] if first else root
        self._pool.publish(blocks, first, hashes[first : len(blocks)], parent)
        self.counters.won += 1
        self.counters.tokens += (len(blocks) - prefix.cached_blocks) * self._layout.block_size
        return tuple(blocks)
