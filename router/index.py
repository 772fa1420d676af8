"""One prefix index for all workers: block hash -> who holds it, as a bit mask of worker slots.

Fed by the workers' KV events (view.py keeps their numbers). A worker's holdings are closed under
prefix (it evicts leaves first), so is their union, and every lookup is a bisection: O(log blocks)
probes, whatever the number of workers.

A snapshot gathers under a slot of its own and becomes visible at once, with its last chunk; the
slot it replaces, like that of a worker that left, is blind from then on and swept away a shard at a
time, so nothing ever walks the whole index. A slot is given out again only after its sweep.

Bounded in bytes: when full, blocks nobody is known to hold are not taken up until workers' removals
have made room. So the index may count too little, never too much.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from core.ids import BlockHash, WorkerId

DEFAULT_MAX_BYTES = 1 << 30
_SHARDS = 256
"""By the first byte of a hash: small dicts grow and are swept without a pause one could notice."""
_SWEPT_PER_OPEN = 8
"""Some milliseconds, in a full index."""
_ENTRY_BYTES = 144
"""Of the key (a bytes object of 16) and a dict entry just after the dict has doubled."""
_BITS_PER_DIGIT = 30
_INT_BYTES = 28


class Level(NamedTuple):
    """How many leading blocks of a prompt the slots of a mask hold."""

    blocks: int
    mask: int


class PrefixIndex:
    """Workers `join`; what they hold goes through the Holdings they get."""

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._shards: list[dict[BlockHash, int]] = [{} for _ in range(_SHARDS)]
        self._bits: list[int] = []
        self._owners: list[WorkerId] = []
        self._free: list[int] = []
        self._blind = 0
        self._sweeping = 0
        self._cursor = 0
        self.max_blocks = 0
        """How many the bound admits, with as many slots as there are now."""
        self.blocks = 0
        """Blocks indexed, those only blind slots hold included."""
        self.not_taken = 0
        """Stored blocks that found the index full, since the start."""
        self.live = 0
        """Mask of the slots that lookups see."""
        self.version = 0
        """Counts changes of `live`."""

    def join(self, worker_id: WorkerId) -> "Holdings":
        """A place for one stream's holdings, empty at first."""
        return Holdings(self, worker_id)

    @property
    def bytes_per_block(self) -> float:
        """What the bound counts for a block; what one takes is less, as masks are shared."""
        return self._max_bytes / max(1, self.max_blocks)

    # -- lookups --------------------------------------------------------------------------------

    def longest(
        self, hashes: Sequence[BlockHash], among: int, high: int | None = None
    ) -> tuple[int, int]:
        """Blocks of the longest prefix that a slot of `among` holds, and the mask of its holders.

        Looks at the first `high` hashes. (0, 0) when nobody holds any.
        """
        shards, low, mask = self._shards, 0, 0
        high = len(hashes) if high is None else high
        while low < high:
            middle = (low + high) >> 1
            block_hash = hashes[middle]
            holders = shards[block_hash[0]].get(block_hash, 0) & among
            if holders:
                low, mask = middle + 1, holders
            else:
                high = middle
        return low, mask

    def holders(self, block_hash: BlockHash) -> int:
        """Mask of all slots that hold this block; those that are blind are not of `live`."""
        return self._shards[block_hash[0]].get(block_hash, 0)

    def levels(self, hashes: Sequence[BlockHash], among: int, enough: int) -> list[Level]:
        """The longest prefixes that slots of `among` hold and their holders, longest first.

        Each holder is in the one level of all it holds. Ends when `enough` holders are found, or
        all; who is in none of them holds no more than the last level.
        """
        found: list[Level] = []
        depth: int | None = None
        while enough > 0 and among:
            depth, mask = self.longest(hashes, among, depth)
            if not mask:
                break
            found.append(Level(depth, mask))
            among &= ~mask
            enough -= mask.bit_count()
        return found

    def pick(self, mask: int, limit: int, start: int) -> list[WorkerId]:
        """Up to `limit` workers of `mask`: those whose slots follow `start`, so that callers who
        vary it do not all see the same few of many.
        """
        return [self._owners[slot] for slot in _slots(mask, limit, start)]

    # -- slots ----------------------------------------------------------------------------------

    def _open(self, worker_id: WorkerId) -> int:
        """A slot nobody sees yet; answers its bit. The bound shrinks with every slot there ever was
        at a time, so those that are gone are swept faster while new ones are asked for.
        """
        for _ in range(_SWEPT_PER_OPEN):
            self.sweep()
        if self._free:
            slot = self._free.pop()
            self._owners[slot] = worker_id
        else:
            slot = len(self._bits)
            self._bits.append(1 << slot)
            self._owners.append(worker_id)
            mask_bytes = _INT_BYTES + 4 * (slot // _BITS_PER_DIGIT)
            self.max_blocks = self._max_bytes // (_ENTRY_BYTES + mask_bytes)
        return self._bits[slot]

    def _show(self, bit: int) -> None:
        self.live |= bit
        self.version += 1

    def _hide(self, bit: int) -> None:
        """Lookups see the slot no more; its bits are swept."""
        self.live &= ~bit
        self.version += 1
        self._blind |= bit
        if not self._sweeping:
            self._begin_sweep()

    def _begin_sweep(self) -> None:
        self._sweeping, self._blind, self._cursor = self._blind, 0, 0

    def sweep(self) -> None:
        """Clear one shard of the slots that are gone; with the last one those are free again."""
        if not self._sweeping:
            return
        shard, gone = self._shards[self._cursor], self._sweeping
        self._take_off(gone, [h for h, mask in shard.items() if mask & gone])
        self._cursor += 1
        if self._cursor == _SHARDS:
            self._free += _slots(gone, gone.bit_count(), 0)
            self._begin_sweep()

    # -- blocks ---------------------------------------------------------------------------------

    def _put_on(self, bit: int, hashes: Iterable[BlockHash]) -> None:
        """`bit` holds these. Neighbours in a chain mostly have equal masks: they share one int."""
        shards, old, new = self._shards, 0, bit
        for block_hash in hashes:
            shard = shards[block_hash[0]]
            mask = shard.get(block_hash, 0)
            if not mask:
                if self.blocks >= self.max_blocks:
                    self.not_taken += 1
                    continue
                self.blocks += 1
            if mask is not old:
                old = mask
                new = mask | bit if mask else bit
            shard[block_hash] = new

    def _take_off(self, bits: int, hashes: Iterable[BlockHash]) -> None:
        shards, old, new = self._shards, 0, 0
        for block_hash in hashes:
            shard = shards[block_hash[0]]
            mask = shard.get(block_hash, 0)
            if not mask & bits:
                continue
            if mask is not old:
                old, new = mask, self._canonical(mask & ~bits)
            if new:
                shard[block_hash] = new
            else:
                del shard[block_hash]
                self.blocks -= 1

    def _canonical(self, mask: int) -> int:
        """One object for all masks of the same single slot."""
        return self._bits[mask.bit_length() - 1] if mask and not mask & (mask - 1) else mask


class Holdings:
    """What one worker holds, as its stream tells; the index's only writer for it."""

    def __init__(self, index: PrefixIndex, worker_id: WorkerId) -> None:
        self._index = index
        self._worker_id = worker_id
        self._gathering: int | None = None
        self.bit = 0
        """The worker's slot in masks; 0 before the first snapshot and after `leave`."""

    def stored(self, hashes: Iterable[BlockHash]) -> None:
        self._index.sweep()
        if self.bit:
            self._index._put_on(self.bit, hashes)

    def removed(self, hashes: Iterable[BlockHash]) -> None:
        self._index.sweep()
        if self.bit:
            self._index._take_off(self.bit, hashes)

    def gather(self, hashes: Iterable[BlockHash]) -> None:
        """A chunk of a snapshot: kept beside what is known."""
        self._index.sweep()
        if self._gathering is None:
            self._gathering = self._index._open(self._worker_id)
        self._index._put_on(self._gathering, hashes)

    def swap(self) -> None:
        """The snapshot is complete: from now on it is what is known."""
        bit, self._gathering = self._gathering, None
        if bit is None:
            return
        if self.bit:
            self._index._hide(self.bit)
        self.bit = bit
        self._index._show(bit)

    def leave(self) -> None:
        """The worker is lost; so is what it held."""
        for bit in (self.bit, self._gathering):
            if bit:
                self._index._hide(bit)
        self.bit, self._gathering = 0, None

    def depth(self, hashes: Sequence[BlockHash], high: int | None = None) -> int:
        """Blocks of the longest prefix of `hashes[:high]` that the worker holds."""
        return self._index.longest(hashes, self.bit, high)[0] if self.bit else 0


def _slots(mask: int, limit: int, start: int) -> list[int]:
    """Up to `limit` set bits, the first ones at or after `start`, then from 0."""
    slots: list[int] = []
    upper = mask >> start << start
    for part in (upper, mask ^ upper):
        left = part
        while left and len(slots) < limit:
            low = left & -left
            slots.append(low.bit_length() - 1)
            left ^= low
    return slots
