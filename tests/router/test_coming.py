"""What is noted of prompts on their way, against a plain count of them."""

from hypothesis import given
from hypothesis import strategies as st

from core.ids import BlockHash, WorkerId
from router.coming import Coming, steps_of
from tests.builders import QUICK

A, B = WorkerId("a"), WorkerId("b")
CHAINS = [
    [BlockHash(bytes([branch if i > 2 else 0, i]) * 8) for i in range(8)] for branch in range(3)
]
PROMPTS = st.tuples(st.sampled_from([A, B]), st.integers(0, 2), st.integers(0, 8))


def test_a_prompt_is_noted_every_512_tokens() -> None:
    hashes = [BlockHash(i.to_bytes(16)) for i in range(100)]
    assert list(steps_of(hashes, 16)) == [hashes[31], hashes[63], hashes[95]]
    assert list(steps_of(hashes, 512)) == hashes
    assert list(steps_of(hashes[:31], 16)) == []


def test_what_was_dropped_is_not_coming_and_the_rest_still_is() -> None:
    coming = Coming()
    coming.add(A, CHAINS[0])
    coming.add(A, CHAINS[1][:5])
    coming.drop(A, CHAINS[0])
    assert coming.steps_at(A, CHAINS[0]) == 3
    coming.drop(A, CHAINS[1][:5])
    assert coming.steps_at(A, CHAINS[0]) == 0
    assert coming.longest(CHAINS[0], 4) == []


@QUICK
@given(st.lists(PROMPTS, max_size=8), st.integers(0, 2), st.integers(0, 8))
def test_lookups_find_the_longest_common_prefix_with_any_prompt_on_its_way(
    prompts: list[tuple[WorkerId, int, int]], branch: int, length: int
) -> None:
    coming, wanted = Coming(), CHAINS[branch][:length]
    best = {A: 0, B: 0}
    for worker, other, steps in prompts:
        chain = CHAINS[other][:steps]
        coming.add(worker, chain)
        shared = 0
        while shared < min(len(chain), len(wanted)) and chain[shared] == wanted[shared]:
            shared += 1
        best[worker] = max(best[worker], shared)
    assert {worker: coming.steps_at(worker, wanted) for worker in best} == best
    most = max(best.values())
    noted = coming.noted(wanted)
    assert noted == wanted[:most]
    assert {worker: coming.steps_at(worker, noted) for worker in best} == best
    holders = {worker for worker, steps in best.items() if steps == most > 0}
    assert set(coming.longest(wanted, 4)) == holders
