"""The prefix index: what it finds, and that it never promises what nobody holds."""

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from core.ids import BlockHash, WorkerId
from router.index import Holdings, PrefixIndex
from tests.builders import QUICK


def chain(length: int, branch: int = 0) -> list[BlockHash]:
    """All branches share no block."""
    return [BlockHash(bytes([7 * i % 256, branch]) + bytes(14)) for i in range(length)]


def joined(index: PrefixIndex, name: str, *hashes: BlockHash) -> Holdings:
    holdings = index.join(WorkerId(name))
    holdings.gather(hashes)
    holdings.swap()
    return holdings


@QUICK
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(0, 40))
def test_the_longest_prefix_and_each_workers_depth_are_found(held: list[int], asked: int) -> None:
    index, blocks = PrefixIndex(), chain(40)
    holdings = [joined(index, str(i), *blocks[:depth]) for i, depth in enumerate(held)]
    depth, mask = index.longest(blocks[:asked], index.live)
    assert depth == min(max(held), asked)
    assert [h.depth(blocks[:asked]) for h in holdings] == [min(depth, asked) for depth in held]
    if depth:
        assert [bool(h.bit & mask) for h in holdings] == [h >= depth for h in held]


def test_a_lookup_probes_as_the_logarithm_of_the_prompt() -> None:
    class Counting(list[BlockHash]):
        probes = 0

        def __getitem__(self, i: int) -> BlockHash:  # type: ignore[override]
            self.probes += 1
            return super().__getitem__(i)

    blocks = [BlockHash(i.to_bytes(16, "little")) for i in range(4096)]
    index = PrefixIndex()
    joined(index, "a", *blocks[:1000])
    asked = Counting(blocks)
    assert index.longest(asked, index.live)[0] == 1000
    assert asked.probes <= 13


def test_levels_come_longest_first_and_hold_each_worker_once() -> None:
    index, blocks = PrefixIndex(), chain(10)
    for name, depth in (("a", 3), ("b", 9), ("c", 0), ("d", 6), ("e", 6)):
        joined(index, name, *blocks[:depth])

    def levels(enough: int) -> list[tuple[int, list[str]]]:
        found = index.levels(blocks, index.live, enough)
        return [(level.blocks, [str(w) for w in index.pick(level.mask, 9, 0)]) for level in found]

    assert levels(9) == [(9, ["b"]), (6, ["d", "e"]), (3, ["a"])]
    assert levels(2) == levels(3) == [(9, ["b"]), (6, ["d", "e"])]


def test_of_many_equal_holders_another_start_picks_others() -> None:
    index = PrefixIndex()
    for i in range(8):
        joined(index, str(i), *chain(4))
    assert index.pick(0b10110101, 2, 3) == ["4", "5"]
    assert index.pick(0b10110101, 3, 6) == ["7", "0", "2"]


def test_workers_outside_the_mask_are_not_seen() -> None:
    index, blocks = PrefixIndex(), chain(4)
    a, b = joined(index, "a", *blocks), joined(index, "b", *blocks[:2])
    assert index.longest(blocks, index.live & ~a.bit) == (2, b.bit)


def test_a_snapshot_shows_only_when_complete_and_then_replaces_all() -> None:
    index, old, new = PrefixIndex(), chain(4), chain(6, branch=1)
    a = joined(index, "a", *old)
    a.gather(new[:3])
    assert (a.depth(old), a.depth(new)) == (4, 0)
    a.gather(new[3:])
    a.swap()
    assert (a.depth(old), a.depth(new)) == (0, 6)


def test_a_lost_workers_blocks_are_gone_at_once_and_their_memory_soon() -> None:
    index, blocks = PrefixIndex(), chain(50)
    a, b = joined(index, "a", *blocks), joined(index, "b", *blocks[:5])
    a.leave()
    assert index.longest(blocks, index.live) == (5, b.bit)
    for _ in range(300):
        b.stored(())
    assert index.blocks == 5


def test_a_slot_given_out_again_knows_nothing_of_its_last_owner() -> None:
    index, blocks = PrefixIndex(), chain(50)
    keeper = joined(index, "k")
    bits = set()
    for i in range(40):
        worker = joined(index, str(i), *blocks[: i + 1])
        assert worker.depth(blocks) == i + 1
        bits.add(worker.bit)
        worker.leave()
        for _ in range(520):
            keeper.stored(())
    assert len(bits) <= 3


def test_workers_that_come_and_go_with_nobody_else_to_speak_use_few_slots() -> None:
    index, blocks = PrefixIndex(), chain(3)
    before = joined(index, "w", *blocks)
    bits = {before.bit}
    for _ in range(500):
        before.leave()
        before = joined(index, "w", *blocks)
        bits.add(before.bit)
    assert len(bits) < 80
    assert before.depth(blocks) == 3


def test_a_full_index_takes_up_nothing_new_and_forgets_nothing_old() -> None:
    index = PrefixIndex(max_bytes=20 * 200)
    first, second = chain(15), chain(15, branch=1)
    a = joined(index, "a", *first)
    a.stored(second)
    assert index.blocks == index.max_blocks < 30
    assert index.not_taken == 30 - index.max_blocks
    assert (a.depth(first), a.depth(second)) == (15, index.max_blocks - 15)
    b = joined(index, "b", *first)
    assert b.depth(first) == 15
    a.removed(reversed(second))
    a.stored(second[:1])
    assert a.depth(second) == 1


class Churn(RuleBasedStateMachine):
    """Three workers that store, evict, resend and leave, against plain sets."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex()
        self.chains = [chain(6, branch) for branch in range(3)]
        self.holdings: dict[int, Holdings] = {}
        self.truth: dict[int, list[int]] = {}

    @rule(worker=st.integers(0, 2), depths=st.tuples(*[st.integers(0, 6)] * 3))
    def snapshot(self, worker: int, depths: tuple[int, ...]) -> None:
        holdings = self.holdings.setdefault(worker, self.index.join(WorkerId(str(worker))))
        for blocks, depth in zip(self.chains, depths, strict=True):
            holdings.gather(blocks[:depth])
        holdings.swap()
        self.truth[worker] = list(depths)

    @precondition(lambda self: self.truth)
    @rule(data=st.data(), branch=st.integers(0, 2), to=st.integers(0, 6))
    def change(self, data: st.DataObject, branch: int, to: int) -> None:
        worker = data.draw(st.sampled_from(sorted(self.truth)))
        blocks, had = self.chains[branch], self.truth[worker][branch]
        self.holdings[worker].stored(blocks[had:to])
        self.holdings[worker].removed(reversed(blocks[to:had]))
        self.truth[worker][branch] = to

    @precondition(lambda self: self.truth)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(sorted(self.truth)))
        self.holdings.pop(worker).leave()
        del self.truth[worker]

    @rule(times=st.integers(1, 300))
    def sweep(self, times: int) -> None:
        for _ in range(times):
            self.index.sweep()

    @invariant()
    def every_depth_is_the_true_one(self) -> None:
        for worker, depths in self.truth.items():
            holdings = self.holdings[worker]
            assert [holdings.depth(blocks) for blocks in self.chains] == depths
        for branch, blocks in enumerate(self.chains):
            longest = max((depths[branch] for depths in self.truth.values()), default=0)
            assert self.index.longest(blocks, self.index.live)[0] == longest


def test_any_order_of_snapshots_events_and_losses_leaves_the_true_depths() -> None:
    run_state_machine_as_test(
        Churn, settings=settings(max_examples=30, stateful_step_count=20, deadline=None)
    )
