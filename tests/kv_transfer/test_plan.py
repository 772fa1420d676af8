"""The plan against an oracle that copies element by element; the exact number of descriptors."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import TransferCause, TransferFailed
from core.ids import BlockId
from core.kv import BLOCK_FIRST, LAYER_FIRST, Axis, KvLayout
from kv_transfer.plan import ArenaShape, ReadPlan, plan_read
from tests.builders import QUICK
from tests.kv_transfer.shards import Model, fill, held, ids, view, wanted

SIZES = (1, 2, 4, 8)
PAIRS = list(product(SIZES, SIZES))
LAYER_FIRST_HEADS_OUTSIDE: tuple[Axis, ...] = ("layer", "side", "block", "head", "token")
LLAMA = Model(heads=8, layers=3, block_size=4)
LATENT = Model(heads=1, layers=3, block_size=4, sides=1)
TOGETHER, APART = range(2, 12), range(1, 20, 2)
NUM_BLOCKS = 20


@dataclass(frozen=True, slots=True)
class Case:
    model: Model
    owners: list[ArenaShape]
    reader: ArenaShape
    remote: list[BlockId]
    local: list[BlockId]

    def plan(self) -> dict[int, ReadPlan]:
        return plan_read(self.owners, self.reader, self.remote, self.local)


def check(case: Case) -> None:
    """Every wanted byte arrives once, no other byte changes, and no shorter plan would do."""
    cell = case.reader.layout.cell_bytes
    truth = case.model.truth(case.owners[0].num_blocks, cell)
    arenas = [np.zeros(o.num_blocks * o.layout.block_bytes, dtype=np.int64) for o in case.owners]
    for owner, memory in zip(case.owners, arenas, strict=True):
        fill(owner, memory, truth)
    before = np.zeros(case.reader.num_blocks * case.reader.layout.block_bytes, dtype=np.int64)
    after, writes = before.copy(), before.copy()
    plans = case.plan()
    for index, plan in plans.items():
        for there, here, nbytes in plan.rows.astype(int).tolist():
            after[here : here + nbytes] = arenas[index][there : there + nbytes]
            writes[here : here + nbytes] += 1
    assert np.array_equal(after, wanted(case.reader, before, truth, case.remote, case.local))
    assert writes.max(initial=0) <= 1
    assert {i: p.descriptors for i, p in plans.items()} == fewest(case, plans)


def fewest(case: Case, plans: dict[int, ReadPlan]) -> dict[int, int]:
    """Runs that are contiguous on both sides, counted byte by byte, per shard of the plan."""
    return {index: _fewest(case, index) for index in plans}


def _fewest(case: Case, index: int) -> int:
    owner = case.owners[index]
    offsets = np.arange(owner.num_blocks * owner.layout.block_bytes)
    source = view(owner, offsets)
    origin = np.full(case.reader.num_blocks * case.reader.layout.block_bytes, -1)
    target = view(case.reader, origin)
    for head in set(held(owner)) & set(held(case.reader)):
        there, here = held(owner).index(head), held(case.reader).index(head)
        for remote, local in zip(case.remote, case.local, strict=True):
            target[local, here] = source[remote, there]
    places = np.flatnonzero(origin >= 0)
    steps = (np.diff(places) != 1) | (np.diff(origin[places]) != 1)
    return 1 + int(steps.sum())


# -- every byte ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("owner_tp", "reader_tp"), PAIRS)
def test_any_tensor_parallel_size_reads_from_any_other(owner_tp: int, reader_tp: int) -> None:
    remote, local = ids([3, 4, 0, 2]), ids([1, 2, 5, 4])
    orders = (BLOCK_FIRST, LAYER_FIRST)
    for heads, theirs, ours in product(SIZES, orders, orders):
        model = Model(heads=heads, block_size=2, head_dim=1)
        owners = model.worker(theirs, owner_tp, 5)
        for reader in model.worker(ours, reader_tp, 6):
            check(Case(model, owners, reader, remote, local))


AXES = st.sampled_from([BLOCK_FIRST, LAYER_FIRST]) | st.permutations(BLOCK_FIRST).map(tuple)


@st.composite
def orders(draw: st.DrawFn) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
    """Two orders of the axes, often equal but for two neighbours: there some runs join."""
    theirs, at = draw(AXES), draw(st.integers(0, 3))
    swapped = (*theirs[:at], theirs[at + 1], theirs[at], *theirs[at + 2 :])
    return theirs, draw(st.just(swapped) | st.just(theirs) | AXES)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    model = Model(
        heads=draw(st.sampled_from(SIZES)),
        layers=draw(st.integers(1, 3)),
        sides=draw(st.sampled_from([1, 2])),
        block_size=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 2)),
    )
    there, here = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    theirs, ours = draw(orders())
    owners = model.worker(theirs, draw(st.sampled_from(SIZES)), there)
    reader = draw(st.sampled_from(model.worker(ours, draw(st.sampled_from(SIZES)), here)))
    # neighbouring blocks come up often enough only when asked for
    local = draw(st.lists(st.integers(0, here - 1), unique=True) | st.just(list(range(here))))
    remote = draw(
        st.lists(st.integers(0, there - 1), min_size=len(local), max_size=len(local))
        | st.integers(0, there).map(lambda first: [(first + i) % there for i in range(len(local))])
    )
    return Case(model, draw(st.permutations(owners)), reader, ids(remote), ids(local))


@settings(QUICK, max_examples=600)
@given(cases())
def test_every_byte_arrives_once_by_the_shortest_plan(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_where_blocks_are_few_runs_join_across_layers(num_blocks: int) -> None:
    theirs: tuple[Axis, ...] = ("layer", "head", "side", "block", "token")
    ours: tuple[Axis, ...] = ("layer", "side", "block", "head", "token")
    model, blocks = Model(), ids(range(num_blocks))
    owners, reader = model.worker(theirs, 1, num_blocks), model.worker(ours, 1, num_blocks)[0]
    check(Case(model, owners, reader, blocks, blocks))


def test_arenas_need_not_have_as_many_blocks() -> None:
    model = Model()
    for axes in (BLOCK_FIRST, LAYER_FIRST):
        owners, reader = model.worker(axes, 2, 9), model.worker(axes, 1, 4)[0]
        check(Case(model, owners, reader, ids([8, 1]), ids([3, 0])))


def test_one_block_may_be_read_into_two() -> None:
    model = Model()
    owners, reader = model.worker(BLOCK_FIRST, 1, 4), model.worker(BLOCK_FIRST, 1, 6)[0]
    check(Case(model, owners, reader, ids([1, 1, 2, 2]), ids([0, 4, 1, 5])))


def test_nothing_to_read_is_no_plan_for_anyone() -> None:
    arenas = LLAMA.worker(BLOCK_FIRST, 1, 4)
    assert plan_read(arenas, arenas[0], [], []) == {}


# -- descriptors --------------------------------------------------------------------------------


def descriptors(
    model: Model,
    theirs: tuple[tuple[Axis, ...], int],
    ours: tuple[tuple[Axis, ...], int],
    blocks: Sequence[int],
) -> list[int]:
    """Per shard read from, for the last rank of the reader; the same block ids on both sides."""
    owners = model.worker(*theirs, NUM_BLOCKS)
    reader = model.worker(*ours, NUM_BLOCKS)[-1]
    case = Case(model, owners, reader, ids(blocks), ids(blocks))
    return [plan.descriptors for plan in case.plan().values()]


@pytest.mark.parametrize("tp", SIZES)
def test_equal_block_first_layouts_read_a_run_of_blocks_in_one(tp: int) -> None:
    side = (BLOCK_FIRST, tp)
    assert descriptors(LLAMA, side, side, TOGETHER) == [1]
    assert descriptors(LLAMA, side, side, APART) == [len(APART)]


def test_blocks_named_in_any_order_are_joined_all_the_same() -> None:
    side = (BLOCK_FIRST, 1)
    assert descriptors(LLAMA, side, side, list(reversed(TOGETHER))) == [1]


@pytest.mark.parametrize(
    ("remote", "local"), [((3, 5), (7, 8)), ((3, 4), (7, 9)), ((3, 4), (8, 7)), ((3, 3), (7, 8))]
)
def test_a_gap_on_either_side_ends_a_run(remote: tuple[int, ...], local: tuple[int, ...]) -> None:
    arenas = LLAMA.worker(BLOCK_FIRST, 1, NUM_BLOCKS)
    plan = plan_read(arenas, arenas[0], ids(remote), ids(local))[0]
    size = arenas[0].layout.block_bytes
    pairs = sorted(zip(remote, local, strict=True), key=lambda pair: pair[1])
    assert plan.rows.tolist() == [[r * size, n * size, size] for r, n in pairs]


@pytest.mark.parametrize("blocks", [TOGETHER, APART])
def test_a_block_first_slice_is_one_descriptor_per_block(blocks: range) -> None:
    n = len(blocks)
    assert descriptors(LLAMA, (BLOCK_FIRST, 2), (BLOCK_FIRST, 4), blocks) == [n]
    assert descriptors(LLAMA, (BLOCK_FIRST, 1), (BLOCK_FIRST, 8), blocks) == [n]
    assert descriptors(LLAMA, (BLOCK_FIRST, 4), (BLOCK_FIRST, 2), blocks) == [n, n]
    assert descriptors(LLAMA, (BLOCK_FIRST, 8), (BLOCK_FIRST, 1), blocks) == [n] * 8


def test_layer_first_takes_two_per_layer_for_a_run_of_blocks_or_for_each_apart() -> None:
    side, per_run = (LAYER_FIRST, 2), 2 * LLAMA.layers
    assert descriptors(LLAMA, side, side, TOGETHER) == [per_run]
    assert descriptors(LLAMA, side, side, APART) == [per_run * len(APART)]


def test_a_whole_layer_first_arena_is_one_run() -> None:
    side = (LAYER_FIRST, 1)
    assert descriptors(LLAMA, side, side, range(NUM_BLOCKS)) == [1]


@pytest.mark.parametrize("blocks", [TOGETHER, APART])
def test_a_slice_of_a_layer_first_arena_is_a_run_per_token_or_per_tile(blocks: range) -> None:
    tiles = 2 * LLAMA.layers * len(blocks)
    per_token = tiles * LLAMA.block_size
    assert descriptors(LLAMA, (LAYER_FIRST, 2), (LAYER_FIRST, 4), blocks) == [per_token]
    outside = LAYER_FIRST_HEADS_OUTSIDE
    assert descriptors(LLAMA, (outside, 2), (outside, 4), blocks) == [tiles]


@pytest.mark.parametrize("blocks", [TOGETHER, APART])
def test_layer_first_to_block_first_is_a_run_per_tile_or_per_cell(blocks: range) -> None:
    tiles = 2 * LLAMA.layers * len(blocks)
    assert descriptors(LLAMA, (LAYER_FIRST, 8), (BLOCK_FIRST, 8), blocks) == [tiles]
    cells = tiles * LLAMA.block_size * LLAMA.heads
    assert descriptors(LLAMA, (LAYER_FIRST, 1), (BLOCK_FIRST, 1), blocks) == [cells]


def test_the_end_of_a_block_joins_the_start_of_the_next_in_other_orders_too() -> None:
    layers_first: tuple[Axis, ...] = ("block", "layer", "head", "side", "token")
    n, per_block = len(TOGETHER), LLAMA.heads * LLAMA.layers
    expected = n * per_block - (n - 1)
    assert descriptors(LLAMA, (layers_first, 1), (BLOCK_FIRST, 1), TOGETHER) == [expected]


@pytest.mark.parametrize(("owner_tp", "reader_tp"), PAIRS)
def test_a_latent_vector_is_read_whole_from_one_rank(owner_tp: int, reader_tp: int) -> None:
    owner, reader = (BLOCK_FIRST, owner_tp), (BLOCK_FIRST, reader_tp)
    assert descriptors(LATENT, owner, reader, TOGETHER) == [1]
    assert descriptors(LATENT, owner, reader, APART) == [len(APART)]


def test_a_layer_first_plan_of_many_blocks_is_made_without_a_loop_over_them() -> None:
    model = Model(layers=32, block_size=16)
    arenas = model.worker(LAYER_FIRST, 1, 600)
    blocks = ids(range(0, 512, 2))
    seconds = []
    for _ in range(7):
        started_s = time.perf_counter()
        plan = plan_read(arenas, arenas[0], blocks, blocks)[0]
        seconds.append(time.perf_counter() - started_s)
    assert plan.descriptors == 256 * 64
    assert min(seconds) < 0.005  # takes 0.0002; a loop over 16,384 runs does not end in time


# -- replicas -----------------------------------------------------------------------------------


def shards_read(model: Model, owner_tp: int, reader_tp: int) -> list[list[int]]:
    """Owner ranks each reader rank reads from."""
    owners = model.worker(BLOCK_FIRST, owner_tp, 4)
    readers = model.worker(BLOCK_FIRST, reader_tp, 4)
    return [sorted(plan_read(owners, reader, ids([0]), ids([0]))) for reader in readers]


@pytest.mark.parametrize("heads", SIZES)
@pytest.mark.parametrize("tp", SIZES)
def test_at_equal_size_each_rank_reads_from_its_own_number(tp: int, heads: int) -> None:
    assert shards_read(Model(heads=heads), tp, tp) == [[rank] for rank in range(tp)]


def test_readers_of_one_head_spread_over_its_replicas() -> None:
    two = Model(heads=2)
    assert shards_read(two, 8, 4) == [[0], [2], [4], [6]]
    assert shards_read(two, 4, 8) == [[0], [0], [1], [1], [2], [2], [3], [3]]
    assert shards_read(two, 8, 1) == [[0, 4]]
    assert shards_read(two, 1, 8) == [[0]] * 8
    assert shards_read(LATENT, 8, 2) == [[0], [4]]


@pytest.mark.parametrize("heads", SIZES)
@pytest.mark.parametrize(("owner_tp", "reader_tp"), PAIRS)
def test_no_shard_serves_more_readers_than_its_share(
    owner_tp: int, reader_tp: int, heads: int
) -> None:
    read = shards_read(Model(heads=heads), owner_tp, reader_tp)
    served = [sum(rank in shards for shards in read) for rank in range(owner_tp)]
    sources = min(owner_tp, max(heads, reader_tp))
    assert max(served) == -(-max(reader_tp, sources) // sources)


def test_a_missing_replica_is_no_reason_to_refuse() -> None:
    two = Model(heads=2)
    owners = two.worker(BLOCK_FIRST, 4, 4)[1:]
    for reader in two.worker(BLOCK_FIRST, 4, 4):
        check(Case(two, owners, reader, ids([1]), ids([2])))


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 8}, "block_size is 8 there and 4 here; set the same engine.block_size"),
        ({"dtype": "float16"}, "dtype is float16 there and float32 here; set the same engine"),
        ({"num_layers": 4}, "num_layers is 4 there and 3 here; both must serve one model"),
        ({"head_dim": 8}, "head_dim is 8 there and 4 here; both must serve one model"),
        ({"sides": 1}, "sides is 1 there and 2 here; both must serve one model"),
        ({"num_kv_heads": 4, "total_kv_heads": 4}, "total KV heads is 4 there and 8 here"),
        ({"tp_size": 3}, "8 KV heads do not divide over tp_size 3"),
        ({"tp_rank": 5}, "tp_rank 5 is not in tp_size 1"),
        ({"num_layers": 0}, "a size of the KV layout is not positive"),
    ],
)
def test_where_there_is_no_plan_the_difference_is_named(
    change: dict[str, object], named: str
) -> None:
    mine = LLAMA.layout(BLOCK_FIRST)
    refused([replace(mine, **change)], mine, named)  # type: ignore[arg-type]


def refused(owners: list[KvLayout], reader: KvLayout, named: str) -> None:
    shapes = [ArenaShape(owner, 4) for owner in owners]
    with pytest.raises(TransferFailed, match=named) as caught:
        plan_read(shapes, ArenaShape(reader, 4), ids([1]), ids([1]))
    assert caught.value.cause is TransferCause.NO_PLAN


def test_a_missing_rank_is_named() -> None:
    ranks = [LLAMA.layout(BLOCK_FIRST, 4, rank) for rank in (0, 1, 3)]
    refused(ranks, LLAMA.layout(BLOCK_FIRST), "its rank 2 of 4, which holds KV head 4, is missing")


def test_an_owner_without_arenas_is_refused() -> None:
    refused([], LLAMA.layout(BLOCK_FIRST), "it offers no arena")


def test_ranks_that_contradict_each_other_are_refused() -> None:
    half = [LLAMA.layout(BLOCK_FIRST, 2, rank) for rank in (0, 1)]
    refused([half[0], half[0]], LLAMA.layout(BLOCK_FIRST), "contradict")
    refused([*half, LLAMA.layout(BLOCK_FIRST, 4, 3)], LLAMA.layout(BLOCK_FIRST), "contradict")


def test_an_arena_of_no_blocks_is_refused() -> None:
    layout = LLAMA.layout(BLOCK_FIRST)
    with pytest.raises(TransferFailed, match="an arena of no blocks") as caught:
        plan_read([ArenaShape(layout, 0)], ArenaShape(layout, 4), ids([0]), ids([0]))
    assert caught.value.cause is TransferCause.NO_PLAN


@pytest.mark.parametrize("axes", [BLOCK_FIRST, LAYER_FIRST])
@pytest.mark.parametrize("block", [-1, 4])
def test_a_block_the_owner_has_not_is_refused(axes: tuple[Axis, ...], block: int) -> None:
    arenas = LLAMA.worker(axes, 1, 4)
    reader = LLAMA.worker(BLOCK_FIRST, 1, 9)[0]
    with pytest.raises(TransferFailed, match="not one of its 4") as caught:
        plan_read(arenas, reader, ids([0, block]), ids([1, 2]))
    assert caught.value.cause is TransferCause.OTHER_PROTOCOL


@pytest.mark.parametrize(
    ("remote", "local", "named"),
    [
        ([1, 2], [1], "2 remote blocks for 1 local"),
        ([1, 2], [3, 3], "target of two"),
        ([1, 2], [3, 4], "not one of 4"),
        ([1, 2], [-1, 3], "not one of 4"),
    ],
)
def test_wrong_local_blocks_are_a_mistake_of_the_caller(
    remote: list[int], local: list[int], named: str
) -> None:
    arenas = LLAMA.worker(BLOCK_FIRST, 1, 4)
    with pytest.raises(ValueError, match=named):
        plan_read(arenas, arenas[0], ids(remote), ids(local))


def test_a_row_is_owner_offset_reader_offset_and_bytes() -> None:
    arenas = LLAMA.worker(BLOCK_FIRST, 1, 9)
    plan = plan_read(arenas, arenas[0], ids([3, 4]), ids([7, 8]))[0]
    size = arenas[0].layout.block_bytes
    assert plan.rows.dtype == np.uint64
    assert plan.rows.tolist() == [[3 * size, 7 * size, 2 * size]]
    assert (plan.nbytes, plan.descriptors) == (2 * size, 1)
