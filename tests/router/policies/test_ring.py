from collections import Counter
from hashlib import blake2b

from core.ids import BlockHash, WorkerId
from router.policies.ring import TwoRings

KEYS = [
    BlockHash(blake2b(bytes([i % 256, i // 256]), digest_size=16).digest()) for i in range(2000)
]


def pool(count: int) -> tuple[WorkerId, ...]:
    return tuple(WorkerId(f"w{i}") for i in range(count))


def homes(rings: TwoRings) -> list[list[WorkerId]]:
    return [rings.homes(key, lambda _: True) for key in KEYS]


def following(workers: tuple[WorkerId, ...]) -> TwoRings:
    rings = TwoRings()
    rings.follow(workers)
    return rings


def test_every_key_has_two_homes_and_they_differ() -> None:
    assert all(len(set(both)) == 2 for both in homes(following(pool(8))))


def test_one_worker_is_the_only_home() -> None:
    assert homes(following(pool(1)))[0] == ["w0"]
    assert TwoRings().homes(KEYS[0], lambda _: True) == []


def test_keys_spread_evenly() -> None:
    counts = Counter(home for both in homes(following(pool(8))) for home in both)
    assert max(counts.values()) < 1.35 * 2 * len(KEYS) / 8


def test_a_worker_more_moves_few_keys_and_never_between_old_workers() -> None:
    rings = following(pool(8))
    before = homes(rings)
    rings.follow(pool(9))
    after = homes(rings)
    moved = [(b, a) for b, a in zip(before, after, strict=True) if a != b]
    assert 0 < len(moved) < len(KEYS) * 0.35
    assert all("w8" in a for _, a in moved)
    assert sum(not set(b) & set(a) for b, a in moved) <= len(KEYS) * 2 / 9


def test_workers_that_come_and_go_leave_the_homes_of_a_fresh_ring() -> None:
    rings = following(pool(5))
    for count in (9, 3, 7):
        rings.follow(pool(count))
        assert homes(rings) == homes(following(pool(count)))


def test_the_home_of_a_closed_worker_is_the_next_one() -> None:
    rings = following(pool(8))
    first, _ = rings.homes(KEYS[0], lambda _: True)
    others = rings.homes(KEYS[0], lambda worker: worker != first)
    assert len(set(others)) == 2
    assert first not in others
