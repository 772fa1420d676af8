"""The block pool: where every block of the arena is, who refers to it, and which prompts it holds.

    FREE --allocate--> IN_USE --release--> CACHED (has a hash) or FREE
    FREE --reserve---> RECEIVING --received--> IN_USE
                       RECEIVING --abandon---> FREE
                       RECEIVING --quarantine-> QUARANTINED --release_quarantined--> FREE
    CACHED --acquire/lease--> IN_USE            CACHED --evicted--> FREE

Every block is in exactly one state; IN_USE means refs > 0, and a block's refs are those of running
sequences plus those of leases. One thread, the event loop's, calls all of this.

A sequence that holds a published block holds all published ancestors of it (`publish` swaps
duplicates for the published block), so no CACHED block has a descendant in use, and evicting
leaves first can reclaim every CACHED block: available = FREE + CACHED.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

from core.errors import InternalError
from core.ids import BlockHash, BlockId
from core.messages import KvRemoved, KvStored


class BlockState(IntEnum):
    FREE = 0
    CACHED = 1
    IN_USE = 2
    RECEIVING = 3
    QUARANTINED = 4


_FREE, _CACHED, _IN_USE, _RECEIVING, _QUARANTINED = BlockState
# Read through the class, a member costs 0.3 us in Python 3.11: most of what a block's move takes.


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolCounts:
    """Blocks by state, and `held`: those with at least one lease (also counted in `in_use`)."""

    free: int
    cached: int
    in_use: int
    receiving: int
    quarantined: int
    held: int


class BlockPool:
    """Owns all blocks of one arena, numbered from 0."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._state = [_FREE] * num_blocks
        self._running = [0] * num_blocks
        self._leased = [0] * num_blocks
        self._hash: list[BlockHash | None] = [None] * num_blocks
        self._parent: list[BlockHash | None] = [None] * num_blocks
        self._used_at = [0] * num_blocks
        self._free: deque[BlockId] = deque(_block_ids(num_blocks))
        self._by_hash: dict[BlockHash, BlockId] = {}
        self._children: dict[BlockHash, int] = {}
        self._num_cached = 0
        self._leaves: list[tuple[int, BlockId]] = []  # a heap; stale entries are skipped
        self._tick = 0
        self._events: list[_Run] = []

    # -- prefix cache ---------------------------------------------------------------------------

    def lookup(self, hashes: Sequence[BlockHash]) -> list[BlockId]:
        """The published blocks of the longest prefix of `hashes`; takes no reference."""
        found, published = list[BlockId](), self._by_hash.get
        for block_hash in hashes:
            block_id = published(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def publish(
        self, blocks: list[BlockId], start: int, hashes: Sequence[BlockHash], parent: BlockHash
    ) -> None:
        """Offer a sequence's blocks from `start` on, full and final, to later prompts; `hashes` are
        theirs, a chain below `parent`.

        Where another block already holds the same prefix, the caller's running reference moves to
        that one, which replaces its own in `blocks`.
        """
        by_hash, children, stored = self._by_hash, self._children, list[BlockHash]()
        above = parent
        for i, block_hash in enumerate(hashes, start):
            block_id, published = blocks[i], by_hash.get(block_hash)
            if published is None:
                self._hash[block_id], self._parent[block_id] = block_hash, parent
                by_hash[block_hash] = block_id
                children[parent] = children.get(parent, 0) + 1
                stored.append(block_hash)
            else:
                if stored:
                    self._record_stored(above, stored)
                above, stored = block_hash, []
                if published != block_id:
                    self.acquire([published])
                    self.release([block_id])
                    blocks[i] = published
            parent = block_hash
        if stored:
            self._record_stored(above, stored)

    def unpublish(self, block_ids: Sequence[BlockId]) -> None:
        """Offer these blocks of one sequence no longer, as their content is in doubt.

        Blocks that others use as well stay: those have read them by now. Below the rest nobody uses
        any: what is cached there goes too, as it would keep them published.
        """
        used = (b for b in block_ids if self._running[b] + self._leased[b] == 1)
        own = {h: b for b in used if (h := self._hash[b]) is not None}
        below = sum(self._children.get(block_hash, 0) for block_hash in own)
        if below == sum(self._parent[block_id] in own for block_id in own.values()):
            gone = own  # as nearly always: no look at all that is published
        else:
            gone = {}
            for block_hash, block_id in self._by_hash.items():  # parents before children
                if block_hash in own or self._parent[block_id] in gone:
                    gone[block_hash] = block_id
        for block_id in reversed(gone.values()):
            self._unpublish(block_id)
            if self._state[block_id] is _CACHED:
                self._num_cached -= 1
                self._to_free(block_id)

    def hashes(self) -> list[BlockHash]:
        """All published hashes, parents before children."""
        return list(self._by_hash)

    def take_events(self) -> list[KvStored | KvRemoved]:
        """What was stored and removed since the last call, in order."""
        runs, self._events = self._events, []
        return [run.event() for run in runs]

    # -- running sequences ----------------------------------------------------------------------

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, evicting cached ones."""
        return len(self._free) + self._num_cached

    def available_beside(self, kept: Iterable[BlockId]) -> int:
        """As `available`, if the blocks of `kept` were acquired first."""
        states = self._state
        return self.available - [states[b] for b in kept].count(_CACHED)

    def allocate(self, count: int) -> list[BlockId] | None:
        """`count` blocks with one running reference each, or None and nothing changed."""
        return self._take(count, _IN_USE)

    def acquire(self, block_ids: Sequence[BlockId]) -> None:
        """One more running reference to blocks that are cached or in use."""
        self._refer(self._running, block_ids)

    def release(self, block_ids: Sequence[BlockId]) -> None:
        """One running reference less; unreferenced blocks become cached, or free without hash."""
        self._drop(self._running, self._leased, block_ids)

    # -- leases ---------------------------------------------------------------------------------

    def lease(self, block_ids: Sequence[BlockId]) -> None:
        """One more lease on blocks that are cached or in use."""
        self._refer(self._leased, block_ids)

    def unlease(self, block_ids: Sequence[BlockId]) -> None:
        """One lease less."""
        self._drop(self._leased, self._running, block_ids)

    # -- transfers ------------------------------------------------------------------------------

    def reserve(self, count: int) -> list[BlockId] | None:
        """`count` blocks as targets of a read, or None and nothing changed."""
        return self._take(count, _RECEIVING)

    def received(self, block_ids: Sequence[BlockId]) -> None:
        """The owner said `closed: held`: the blocks are usable, one running reference each."""
        for block_id in block_ids:
            self._expect(block_id, _RECEIVING)
            self._state[block_id] = _IN_USE
            self._running[block_id] = 1

    def abandon(self, block_ids: Sequence[BlockId]) -> None:
        """No read targets these blocks any more, and their content may not be used."""
        for block_id in block_ids:
            self._expect(block_id, _RECEIVING)
            self._to_free(block_id)

    def quarantine(self, block_ids: Sequence[BlockId]) -> None:
        """A read not known to have ended may still write here."""
        for block_id in block_ids:
            self._expect(block_id, _RECEIVING)
            self._state[block_id] = _QUARANTINED

    def release_quarantined(self, block_ids: Sequence[BlockId]) -> None:
        """That read has ended."""
        for block_id in block_ids:
            self._expect(block_id, _QUARANTINED)
            self._to_free(block_id)

    # -- invariants -----------------------------------------------------------------------------

    def counts(self) -> PoolCounts:
        by_state = Counter(self._state)
        return PoolCounts(
            free=by_state[_FREE],
            cached=by_state[_CACHED],
            in_use=by_state[_IN_USE],
            receiving=by_state[_RECEIVING],
            quarantined=by_state[_QUARANTINED],
            held=sum(leases > 0 for leases in self._leased),
        )

    def check(self) -> None:
        """Raise InternalError where block conservation, references or the index do not hold."""
        problems = [*self._check_blocks(), *self._check_index()]
        if problems:
            raise InternalError("pool invariant broken: " + "; ".join(problems[:5]))

    def check_leases(self, held: Mapping[BlockId, int]) -> None:
        """Raise InternalError unless `held` is how often each block is leased."""
        for block_id, leases in enumerate(self._leased):
            if leases != held.get(BlockId(block_id), 0):
                raise InternalError(
                    f"block {block_id} has {leases} leases, not {held.get(BlockId(block_id), 0)}"
                )

    def check_idle(self) -> None:
        """Raise InternalError unless only leases refer to blocks: nothing runs, nothing moves."""
        counts = self.counts()
        if any(self._running) or counts.receiving:
            raise InternalError(f"blocks are referenced although nothing runs: {counts}")

    def _check_blocks(self) -> list[str]:
        problems: list[str] = []
        counts = Counter(self._state)
        free = set(self._free)
        if len(free) != len(self._free) or len(free) != counts[_FREE]:
            problems.append(f"free list has {len(self._free)}, states say {counts[_FREE]}")
        if self._num_cached != counts[_CACHED]:
            problems.append(f"cached count {self._num_cached}, states say {counts[_CACHED]}")
        for i in range(self.num_blocks):
            refs = self._running[i] + self._leased[i]
            state = self._state[i]
            if (refs > 0) != (state is _IN_USE):
                problems.append(f"block {i} is {state.name} with {refs} references")
            if state is _FREE and i not in free:
                problems.append(f"block {i} is free but not in the free list")
            if self._hash[i] is None and state is _CACHED:
                problems.append(f"block {i} is cached without a hash")
            if self._hash[i] is not None and state not in (_CACHED, _IN_USE):
                problems.append(f"block {i} is {state.name} with a hash")
        return problems

    def _check_index(self) -> list[str]:
        problems: list[str] = []
        children: Counter[BlockHash] = Counter()
        for block_hash, block_id in self._by_hash.items():
            if self._hash[block_id] != block_hash:
                problems.append(f"index names block {block_id} for another hash")
            parent = self._parent[block_id]
            if parent is not None:
                children[parent] += 1
                above = self._by_hash.get(parent)
                in_use = self._state[block_id] is _IN_USE
                if above is not None and in_use and self._state[above] is _CACHED:
                    problems.append(f"block {block_id} is in use below the cached block {above}")
        if dict(children) != self._children:
            problems.append("child counts differ from the index")
        hashed = sum(block_hash is not None for block_hash in self._hash)
        if hashed != len(self._by_hash):
            problems.append(f"{hashed} blocks have a hash, the index has {len(self._by_hash)}")
        return problems

    # -- moves ----------------------------------------------------------------------------------

    def _take(self, count: int, state: BlockState) -> list[BlockId] | None:
        if count > self.available:
            return None
        short = count - len(self._free)
        if short > 0:
            self._evict(short)
        pop, states, running = self._free.popleft, self._state, self._running
        taken, refs = [pop() for _ in range(count)], 1 if state is _IN_USE else 0
        for block_id in taken:
            states[block_id] = state
            running[block_id] = refs
        return taken

    def _evict(self, count: int) -> None:
        """Free the `count` least recently used leaves of the prefix tree, of which there are as
        many as cached blocks: a leaf that goes may leave its parent as one.
        """
        leaves, children, by_hash = self._leaves, self._children, self._by_hash
        states, used_at, removed = self._state, self._used_at, list[BlockHash]()
        bared: tuple[int, BlockId] | None = None  # mostly the next to go: a chain ages together
        while len(removed) < count:
            leaf = heapq.heappop(leaves) if bared is None else heapq.heappushpop(leaves, bared)
            bared, (at, block_id) = None, leaf
            if used_at[block_id] != at or states[block_id] is not _CACHED:
                continue
            block_hash, parent = self._hash[block_id], self._parent[block_id]
            if block_hash is None or parent is None or block_hash in children:
                continue
            del by_hash[block_hash]
            self._hash[block_id] = self._parent[block_id] = None
            left = children[parent] - 1
            if left:
                children[parent] = left
            else:
                del children[parent]
                above = by_hash.get(parent)
                if above is not None and states[above] is _CACHED:
                    bared = used_at[above], above
            self._to_free(block_id)
            removed.append(block_hash)
        if bared is not None:
            heapq.heappush(leaves, bared)
        self._num_cached -= count
        self._record_removed(removed)

    def _is_leaf(self, block_id: BlockId) -> bool:
        block_hash = self._hash[block_id]
        return (
            self._state[block_id] is _CACHED
            and block_hash is not None
            and block_hash not in self._children
        )

    def _unpublish(self, block_id: BlockId) -> None:
        block_hash, parent = self._hash[block_id], self._parent[block_id]
        if block_hash is None or parent is None:
            raise InternalError(f"block {block_id} has no hash to remove")
        del self._by_hash[block_hash]
        self._children.pop(block_hash, None)
        self._hash[block_id] = self._parent[block_id] = None
        left = self._children[parent] - 1
        if left:
            self._children[parent] = left
        else:
            del self._children[parent]
            above = self._by_hash.get(parent)
            if above is not None and self._is_leaf(above):
                heapq.heappush(self._leaves, (self._used_at[above], above))
        self._record_removed([block_hash])

    def _refer(self, counts: list[int], block_ids: Sequence[BlockId]) -> None:
        """One more reference in `counts` to blocks that are cached or in use."""
        states = self._state
        for block_id in block_ids:
            state = states[block_id]
            if state is _CACHED:
                self._num_cached -= 1
                states[block_id] = _IN_USE
            elif state is not _IN_USE:
                raise InternalError(f"block {block_id} is {state.name}, not cached or in use")
            counts[block_id] += 1

    def _drop(self, counts: list[int], others: list[int], block_ids: Sequence[BlockId]) -> None:
        """One reference less in `counts`. Nobody refers to a block that has none in `others`
        either: it is cached now, or free.
        """
        states, used_at, hashes, children = self._state, self._used_at, self._hash, self._children
        for block_id in block_ids:
            left = counts[block_id] - 1
            if left < 0:
                raise InternalError(f"block {block_id} has no such reference to give back")
            counts[block_id] = left
            if left or others[block_id]:
                continue
            block_hash = hashes[block_id]
            if block_hash is None:
                self._to_free(block_id)
                continue
            states[block_id] = _CACHED
            self._num_cached += 1
            self._tick += 1
            used_at[block_id] = self._tick
            if block_hash not in children:
                heapq.heappush(self._leaves, (self._tick, block_id))
        if len(self._leaves) > 4 * self.num_blocks:
            self._rebuild_leaves()

    def _rebuild_leaves(self) -> None:
        self._leaves = [(self._used_at[b], b) for b in self._by_hash.values() if self._is_leaf(b)]
        heapq.heapify(self._leaves)

    def _to_free(self, block_id: BlockId) -> None:
        self._state[block_id] = _FREE
        self._free.append(block_id)

    def _expect(self, block_id: BlockId, state: BlockState) -> None:
        if self._state[block_id] is not state:
            raise InternalError(
                f"block {block_id} is {self._state[block_id].name}, expected {state.name}"
            )

    def _record_stored(self, parent: BlockHash, hashes: list[BlockHash]) -> None:
        last = self._events[-1] if self._events else None
        if last is not None and last.parent is not None and last.hashes[-1] == parent:
            last.hashes += hashes
        else:
            self._events.append(_Run(parent=parent, hashes=hashes))

    def _record_removed(self, hashes: list[BlockHash]) -> None:
        last = self._events[-1] if self._events else None
        if last is not None and last.parent is None:
            last.hashes += hashes
        else:
            self._events.append(_Run(parent=None, hashes=hashes))


@lru_cache(maxsize=4)
def _block_ids(num_blocks: int) -> tuple[BlockId, ...]:
    """Shared by pools of one size: those of a simulated fleet would else hold millions of ints."""
    return tuple(map(BlockId, range(num_blocks)))


@dataclass(slots=True, kw_only=True)
class _Run:
    """Consecutive events of one kind: stored as a chain below `parent`, or removed (None)."""

    parent: BlockHash | None
    hashes: list[BlockHash]

    def event(self) -> KvStored | KvRemoved:
        if self.parent is None:
            return KvRemoved(hashes=tuple(self.hashes))
        return KvStored(parent=self.parent, hashes=tuple(self.hashes))
