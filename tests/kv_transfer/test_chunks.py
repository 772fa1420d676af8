"""Cutting and copying against the plainest possible way to do it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.kv import KvLayout
from engine.arena import Arena
from kv_transfer.chunks import ArenaBytes, Runs
from tests.builders import QUICK

LAYOUT = KvLayout(block_size=16, num_kv_heads=2, num_layers=2, head_dim=16, dtype="bfloat16")
CHUNK_BYTES = 4096

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def noisy(device: str, num_blocks: int) -> Arena:
    arena = Arena(LAYOUT, num_blocks, device)
    as_bytes(arena).random_(0, 256)
    return arena


def as_bytes(arena: Arena) -> torch.Tensor:
    return arena.data.view(-1).view(torch.uint8)


def make_runs(places: list[tuple[int, int]], chunk_bytes: int = CHUNK_BYTES) -> Runs:
    offsets, lengths = (np.array(column, dtype=np.int64) for column in zip(*places, strict=True))
    return Runs(offsets, lengths, chunk_bytes)


def string_of(runs: Runs, data: bytes) -> bytes:
    """All chunks of the runs, one after another."""
    return b"".join(
        data[offset : offset + nbytes]
        for pieces in runs
        for offset, nbytes in zip(pieces.offsets, pieces.lengths, strict=True)
    )


places = st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 10_000)), min_size=1, max_size=9)


@QUICK
@given(places, st.sampled_from([1, 64, 4096, 65_536]))
def test_chunks_are_the_runs_end_to_end(runs_at: list[tuple[int, int]], chunk_bytes: int) -> None:
    data = np.random.default_rng(0).bytes(30_000)
    runs = make_runs(runs_at, chunk_bytes)
    assert string_of(runs, data) == b"".join(data[at : at + size] for at, size in runs_at)
    sizes = [pieces.nbytes for pieces in runs]
    assert sizes == [runs.size(number) for number in range(runs.chunks)]
    assert sizes[:-1] == [chunk_bytes] * (len(sizes) - 1)


@QUICK
@given(places)
def test_the_unit_divides_every_piece(runs_at: list[tuple[int, int]]) -> None:
    for pieces in make_runs([(at * 48, size * 48) for at, size in runs_at]):
        assert pieces.unit >= 16
        assert not (pieces.offsets % pieces.unit).any()
        assert not (pieces.lengths % pieces.unit).any()


@pytest.mark.parametrize(
    ("device", "staging"),
    [
        ("cpu", "cpu"),
        pytest.param("cuda", "cpu", marks=ON_GPU),
        pytest.param("cuda", "cuda", marks=ON_GPU),
    ],
)
@pytest.mark.parametrize(
    ("unit", "count"),
    [(1, 40), (64, 100), (LAYOUT.block_bytes, 30), (192 << 10, 3)],
    ids=["bytes", "units", "blocks", "long runs"],
)
def test_what_is_read_here_and_written_there_is_the_same(
    device: str, staging: str, unit: int, count: int
) -> None:
    owner, reader = noisy(device, 512), noisy(device, 512)
    before = as_bytes(reader).cpu().numpy().copy()
    random = np.random.default_rng(unit)
    slots = owner.nbytes // (2 * unit)
    sources, targets = (random.permutation(slots)[:count] * 2 * unit for _ in range(2))
    lengths = random.integers(1, 3, len(sources)) * unit
    chunk_bytes = 1 << 18
    for there, here in zip(
        Runs(sources, lengths, chunk_bytes), Runs(targets, lengths, chunk_bytes), strict=True
    ):
        buffer = torch.empty(there.nbytes, dtype=torch.uint8, device=staging)
        ArenaBytes(owner).read(there, buffer)
        ArenaBytes(reader).write(here, buffer)
    data = as_bytes(owner).cpu().numpy()
    for source, target, nbytes in zip(sources, targets, lengths, strict=True):
        before[target : target + nbytes] = data[source : source + nbytes]
    assert np.array_equal(as_bytes(reader).cpu().numpy(), before)


def test_a_single_run_needs_no_copy() -> None:
    arena = noisy("cpu", 8)
    one, two = make_runs([(64, 100)]), make_runs([(0, 64), (128, 64)])
    part = ArenaBytes(arena).one_run(next(iter(one)))
    assert part is not None
    assert part.data_ptr() == arena.address + 64
    assert len(part) == 100
    assert ArenaBytes(arena).one_run(next(iter(two))) is None
