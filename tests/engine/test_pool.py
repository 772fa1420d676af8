"""The block pool against a simple model of it, and its rules one by one."""

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.blocks import chain_hashes, root_hash
from core.errors import InternalError
from core.ids import BlockHash, BlockId, ModelId
from core.messages import KvRemoved, KvStored
from engine.pool import BlockPool, PoolCounts
from tests.builders import QUICK

ROOT = root_hash(ModelId("m"))


def chain(name: int, length: int) -> list[BlockHash]:
    """Hashes of `length` blocks; names differ from the first block on."""
    return chain_hashes([name] * length, 1, ROOT)


def take(pool: BlockPool, count: int) -> list[BlockId]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def publish(
    pool: BlockPool, blocks: Sequence[BlockId], hashes: Sequence[BlockHash]
) -> list[BlockId]:
    published = list(blocks)
    pool.publish(published, 0, hashes, ROOT)
    return published


def cache(pool: BlockPool, hashes: Sequence[BlockHash]) -> list[BlockId]:
    """A chain that no one refers to any more."""
    blocks = publish(pool, take(pool, len(hashes)), hashes)
    pool.release(blocks)
    return blocks


def counts(pool: BlockPool, **changed: int) -> bool:
    """The pool's counts are zero but for those given and what is free."""
    pool.check()
    values = {"cached": 0, "in_use": 0, "receiving": 0, "quarantined": 0, "held": 0, **changed}
    free = pool.num_blocks - sum(values.values()) + values["held"]
    return pool.counts() == PoolCounts(free=free, **values)


# -- transitions --------------------------------------------------------------------------------


def test_allocated_blocks_are_in_use_until_released() -> None:
    pool = BlockPool(4)
    blocks = take(pool, 3)
    assert counts(pool, in_use=3)
    pool.release(blocks)
    assert counts(pool)


def test_too_many_blocks_are_refused_and_nothing_changes() -> None:
    pool = BlockPool(4)
    cached = cache(pool, chain(1, 2))
    assert pool.allocate(5) is None
    assert pool.reserve(5) is None
    assert pool.lookup(chain(1, 2)) == cached


def test_a_published_block_stays_cached_after_release() -> None:
    pool = BlockPool(4)
    cache(pool, chain(1, 2))
    assert counts(pool, cached=2)
    assert pool.available == 4


def test_a_second_reference_keeps_a_block_in_use() -> None:
    pool = BlockPool(4)
    blocks = take(pool, 1)
    pool.acquire(blocks)
    pool.release(blocks)
    assert counts(pool, in_use=1)


def test_a_lease_holds_a_block_its_sequence_gave_back() -> None:
    pool = BlockPool(4)
    blocks = take(pool, 2)
    pool.lease(blocks)
    pool.release(blocks)
    assert counts(pool, in_use=2, held=2)
    pool.unlease(blocks)
    assert counts(pool)


def test_a_cached_block_can_be_acquired_and_leased_again() -> None:
    pool = BlockPool(4)
    first, second = cache(pool, chain(1, 2))
    pool.acquire([first])
    assert counts(pool, in_use=1, cached=1)
    pool.lease([second, first])
    assert counts(pool, in_use=2, held=2)


def test_received_blocks_have_one_running_reference() -> None:
    pool = BlockPool(4)
    blocks = pool.reserve(3) or []
    assert counts(pool, receiving=3)
    pool.received(blocks)
    assert counts(pool, in_use=3)
    pool.release(blocks)
    assert counts(pool)


def test_abandoned_blocks_are_free_at_once() -> None:
    pool = BlockPool(4)
    pool.abandon(pool.reserve(3) or [])
    assert counts(pool)


def test_quarantined_blocks_are_not_available_until_released() -> None:
    pool = BlockPool(4)
    blocks = pool.reserve(3) or []
    pool.quarantine(blocks)
    assert counts(pool, quarantined=3)
    assert pool.allocate(2) is None
    pool.release_quarantined(blocks)
    assert counts(pool)


@pytest.mark.parametrize(
    "move",
    [
        "release",
        "unlease",
        "acquire",
        "lease",
        "received",
        "abandon",
        "quarantine",
        "release_quarantined",
    ],
)
def test_no_move_starts_from_a_free_block(move: str) -> None:
    pool = BlockPool(1)
    with pytest.raises(InternalError):
        getattr(pool, move)([BlockId(0)])


@pytest.mark.parametrize("move", ["acquire", "lease", "release"])
def test_a_block_under_a_read_cannot_be_used(move: str) -> None:
    pool = BlockPool(1)
    blocks = pool.reserve(1) or []
    with pytest.raises(InternalError):
        getattr(pool, move)(blocks)


# -- the prefix cache ---------------------------------------------------------------------------


def test_lookup_finds_the_longest_published_prefix() -> None:
    pool = BlockPool(8)
    blocks = cache(pool, chain(1, 3))
    other = chain(2, 1)
    assert pool.lookup(chain(1, 5)) == blocks
    assert pool.lookup([*chain(1, 2), *other]) == blocks[:2]
    assert pool.lookup(other) == []


def test_publishing_a_duplicate_swaps_to_the_published_block() -> None:
    pool = BlockPool(4)
    (first,) = publish(pool, take(pool, 1), chain(1, 1))
    own = take(pool, 1)
    assert publish(pool, own, chain(1, 1)) == [first]
    assert counts(pool, in_use=1)
    pool.release([first])
    assert counts(pool, in_use=1)
    pool.release([first])
    assert counts(pool, cached=1)


def test_publishing_a_duplicate_of_a_cached_block_brings_it_back_in_use() -> None:
    pool = BlockPool(4)
    (first,) = cache(pool, chain(1, 1))
    assert publish(pool, take(pool, 1), chain(1, 1)) == [first]
    assert counts(pool, in_use=1)


def test_publishing_again_changes_nothing() -> None:
    pool = BlockPool(4)
    blocks = publish(pool, take(pool, 2), chain(1, 2))
    assert publish(pool, blocks, chain(1, 2)) == blocks
    assert counts(pool, in_use=2)


def test_unpublished_blocks_are_found_no_more_and_go_free() -> None:
    pool = BlockPool(4)
    hashes = chain(1, 2)
    blocks = take(pool, 2)
    publish(pool, blocks, hashes)
    pool.unpublish(blocks)
    assert pool.lookup(hashes) == []
    pool.release(blocks)
    pool.check()
    assert counts(pool)


def test_what_was_cached_below_an_unpublished_block_goes_with_it() -> None:
    pool = BlockPool(8)
    longer, other = chain(1, 4), chain(2, 1)
    cached = cache(pool, longer)
    cache(pool, other)
    pool.take_events()
    pool.acquire(cached[:2])  # a prompt that begins alike and fails
    pool.unpublish(cached[:2])
    assert pool.lookup(longer) == []
    assert pool.lookup(other) != []
    assert pool.take_events() == [KvRemoved(hashes=tuple(reversed(longer)))]
    assert counts(pool, in_use=2, cached=1)
    pool.release(cached[:2])
    assert counts(pool, cached=1)
    assert pool.allocate(8) is not None


def test_a_block_that_others_use_stays_published_and_so_do_its_ancestors() -> None:
    pool = BlockPool(4)
    hashes = chain(1, 3)
    blocks = take(pool, 3)
    publish(pool, blocks, hashes)
    pool.acquire(blocks[:2])
    pool.unpublish(blocks)
    assert pool.lookup(hashes) == blocks[:2]
    pool.check()


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(4)
    cached = cache(pool, chain(1, 2))
    take(pool, 2)
    assert pool.lookup(chain(1, 2)) == cached


def test_eviction_takes_leaves_first() -> None:
    pool = BlockPool(3)
    first, second, third = cache(pool, chain(1, 3))
    assert take(pool, 2) == [third, second]
    assert pool.lookup(chain(1, 3)) == [first]


def test_eviction_takes_the_least_recently_used_leaf() -> None:
    pool = BlockPool(4)
    a = cache(pool, chain(1, 2))
    b = cache(pool, chain(2, 2))
    pool.acquire(a)
    pool.release(a)
    assert take(pool, 3) == [b[1], b[0], a[1]]


def test_a_parent_used_since_its_child_waits_for_its_own_turn() -> None:
    pool = BlockPool(4)
    a = cache(pool, chain(1, 2))
    b = cache(pool, chain(2, 2))
    pool.acquire(a[:1])
    pool.release(a[:1])
    assert take(pool, 4) == [a[1], b[1], b[0], a[0]]


def test_a_parent_bared_by_the_last_eviction_goes_with_the_next() -> None:
    pool = BlockPool(2)
    first, second = cache(pool, chain(1, 2))
    assert [take(pool, 1), take(pool, 1)] == [[second], [first]]


def test_a_parent_is_evicted_after_all_its_children() -> None:
    pool = BlockPool(3)
    (parent,) = publish(pool, take(pool, 1), chain(1, 1))
    children = take(pool, 2)
    for i in (0, 1):
        pool.publish(children, i, chain_hashes([1, 7 + i], 1, ROOT)[1:], chain(1, 1)[0])
    pool.release([parent, *children])
    assert take(pool, 3) == [*children, parent]


def test_a_leaf_in_use_is_not_evicted_nor_is_its_parent() -> None:
    pool = BlockPool(3)
    blocks = cache(pool, chain(1, 2))
    pool.acquire(blocks)
    assert pool.available == 1
    assert pool.allocate(2) is None


def test_blocks_kept_are_not_counted_as_available_beside_themselves() -> None:
    pool = BlockPool(4)
    cached = cache(pool, chain(1, 3))
    assert pool.available_beside(cached) == 1
    assert pool.available_beside(cached[:1]) == 3


def test_repeated_use_of_the_cache_keeps_the_order_of_eviction() -> None:
    """The list of leaves is rebuilt when stale entries fill it."""
    pool = BlockPool(4)
    a, b = cache(pool, chain(1, 1)), cache(pool, chain(2, 1))
    for _ in range(50):
        for blocks in (a, b):
            pool.acquire(blocks)
            pool.release(blocks)
    take(pool, 2)
    assert take(pool, 1) == a


# -- events -------------------------------------------------------------------------------------


def test_a_chain_is_told_as_one_event_and_its_eviction_leaf_first() -> None:
    pool = BlockPool(3)
    hashes = chain(1, 3)
    cache(pool, hashes)
    assert pool.take_events() == [KvStored(parent=ROOT, hashes=tuple(hashes))]
    take(pool, 3)
    assert pool.take_events() == [KvRemoved(hashes=tuple(reversed(hashes)))]
    assert pool.take_events() == []


def test_chains_with_different_parents_are_told_apart() -> None:
    pool = BlockPool(4)
    cache(pool, chain(1, 1))
    cache(pool, chain(2, 2))
    assert pool.take_events() == [
        KvStored(parent=ROOT, hashes=tuple(chain(1, 1))),
        KvStored(parent=ROOT, hashes=tuple(chain(2, 2))),
    ]


# -- checks -------------------------------------------------------------------------------------


def test_check_finds_a_block_in_two_places() -> None:
    pool = BlockPool(2)
    (block,) = take(pool, 1)
    pool._free.append(block)
    with pytest.raises(InternalError, match="free list"):
        pool.check()


def test_check_finds_a_reference_without_use() -> None:
    pool = BlockPool(2)
    pool._running[1] = 1
    with pytest.raises(InternalError, match="block 1 is FREE with 1 references"):
        pool.check()


def test_check_idle_finds_what_still_runs() -> None:
    pool = BlockPool(2)
    pool.check_idle()
    take(pool, 1)
    with pytest.raises(InternalError, match="nothing runs"):
        pool.check_idle()


# -- against a model ----------------------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """Sequences, leases and reads use a small pool as the runner, owners and readers do.

    The model: per block its references, the set of reserved and quarantined blocks, and the map
    of published prefixes. Eviction is checked by its rules: an unreferenced block goes only when
    nothing else is free, and never before its descendants.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.sequences: list[tuple[int, list[BlockId], int]] = []  # prompt, blocks, published
        self.leases: list[list[BlockId]] = []
        self.reads: list[list[BlockId]] = []
        self.quarantined: list[list[BlockId]] = []
        self.told: set[BlockHash] = set()

    # A prompt is a number; its block i is named by the digits up to i, so prompts share prefixes.

    @staticmethod
    def hashes(prompt: int, count: int) -> list[BlockHash]:
        digits = [prompt >> (2 * i) & 3 for i in range(count)]
        return chain_hashes(digits, 1, ROOT)

    @rule(prompt=st.integers(0, 63), count=st.integers(1, 3))
    def start(self, prompt: int, count: int) -> None:
        hashes = self.hashes(prompt, count)
        cached = self.pool.lookup(hashes)
        missing = count - len(cached)
        fits = missing <= self.pool.available_beside(cached)
        if not fits:
            return
        self.pool.acquire(cached)
        fresh = self.pool.allocate(missing)
        assert fresh is not None
        self.sequences.append((prompt, [*cached, *fresh], len(cached)))

    @rule(count=st.integers(0, 7))
    def allocate_as_much_as_available(self, count: int) -> None:
        fits = count <= self.pool.available
        blocks = self.pool.allocate(count)
        assert (blocks is not None) == fits
        if blocks is not None:
            assert len(set(blocks)) == count
            self.pool.release(blocks)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def publish_next(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        prompt, blocks, published = self.sequences[i]
        if published == len(blocks):
            return
        end = data.draw(st.integers(published + 1, len(blocks)))
        hashes = [ROOT, *self.hashes(prompt, end)]
        self.pool.publish(blocks, published, hashes[published + 1 :], hashes[published])
        self.sequences[i] = (prompt, blocks, end)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        """What is announced was published before: publishing may put other blocks in its place."""
        _, blocks, published = data.draw(st.sampled_from(self.sequences))
        self.pool.lease(blocks[:published])
        self.leases.append(blocks[:published])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        self.pool.release(self.sequences.pop(i)[1])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Its KV is in doubt: nobody finds what it alone used."""
        i = data.draw(st.integers(0, len(self.sequences) - 1))
        prompt, blocks, _ = self.sequences.pop(i)
        others = {b for _, used, _ in self.sequences for b in used}.union(*self.leases)
        self.pool.unpublish(blocks)
        found = self.pool.lookup(self.hashes(prompt, len(blocks)))
        assert others.issuperset(block for block in blocks if block in found)
        self.pool.release(blocks)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def unlease(self, data: st.DataObject) -> None:
        self.pool.unlease(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))

    @rule(count=st.integers(1, 7))
    def reserve(self, count: int) -> None:
        fits = count <= self.pool.available
        blocks = self.pool.reserve(count)
        assert (blocks is not None) == fits
        if blocks is not None:
            self.reads.append(blocks)

    @precondition(lambda self: self.reads)
    @rule(how=st.sampled_from(["received", "abandon", "quarantine"]), prompt=st.integers(0, 63))
    def end_read(self, how: str, prompt: int) -> None:
        blocks = self.reads.pop(0)
        getattr(self.pool, how)(blocks)
        if how == "received":
            self.sequences.append((prompt, blocks, 0))
        elif how == "quarantine":
            self.quarantined.append(blocks)

    @precondition(lambda self: self.quarantined)
    @rule()
    def release_quarantined(self) -> None:
        self.pool.release_quarantined(self.quarantined.pop(0))

    @invariant()
    def conserved(self) -> None:
        self.pool.check()
        held = {b for blocks in self.leases for b in blocks}
        in_use = held | {b for _, blocks, _ in self.sequences for b in blocks}
        counted = self.pool.counts()
        assert counted.held == len(held)
        assert counted.in_use == len(in_use)
        assert counted.receiving == sum(map(len, self.reads))
        assert counted.quarantined == sum(map(len, self.quarantined))
        assert self.pool.available == counted.free + counted.cached

    @invariant()
    def events_tell_what_is_held(self) -> None:
        for event in self.pool.take_events():
            if isinstance(event, KvStored):
                assert event.parent in self.told or event.parent == ROOT
                assert self.told.isdisjoint(event.hashes)
                self.told.update(event.hashes)
            else:
                assert self.told.issuperset(event.hashes)
                self.told.difference_update(event.hashes)
        assert self.told == set(self.pool.hashes())

    @invariant()
    def holdings_are_closed_under_prefix(self) -> None:
        for prompt, blocks, published in self.sequences:
            assert self.pool.lookup(self.hashes(prompt, published)) == blocks[:published]


def test_pool_against_the_model() -> None:
    run_state_machine_as_test(
        PoolMachine, settings=settings(QUICK, max_examples=60, stateful_step_count=40)
    )
