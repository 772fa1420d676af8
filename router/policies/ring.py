"""Two consistent-hash rings over the workers: where a key has its two homes.

DualMap (ICLR'26, arXiv 2602.06502): each key has two candidates, its clockwise successors by two
independent hashes. When a worker comes or goes only keys next to it move, on one of the rings at a
time, so the other home keeps their cache. A key is a block hash: its halves are the two hashes.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import NamedTuple

from core.ids import BlockHash, WorkerId

_POINTS = 64
"""Of each worker on each ring: shares within about 1/8 of the mean."""


class _Ring(NamedTuple):
    """Points in order of place, and whose each is."""

    places: list[int]
    workers: list[WorkerId]


class TwoRings:
    """`follow` the pool, then ask for `homes`."""

    def __init__(self) -> None:
        self._pool: Sequence[WorkerId] = ()
        self._rings = (_Ring([], []), _Ring([], []))

    def follow(self, pool: Sequence[WorkerId]) -> None:
        """Take in who came, leave out who went. At once when `pool` is the one known."""
        if pool is self._pool:
            return
        new = set(pool)
        fresh = new.difference(self._pool)
        self._pool = pool
        for number, ring in enumerate(self._rings):
            points = [p for p in zip(ring.places, ring.workers, strict=True) if p[1] in new]
            points += [
                (_place(worker, number, i), worker) for worker in fresh for i in range(_POINTS)
            ]
            points.sort()
            ring.places[:] = [place for place, _ in points]
            ring.workers[:] = [worker for _, worker in points]

    def homes(self, key: BlockHash, is_open: Callable[[WorkerId], bool]) -> list[WorkerId]:
        """Up to two different open workers: the key's successor on each ring, or who follows."""
        found: list[WorkerId] = []
        for ring, half in zip(self._rings, (key[:8], key[8:]), strict=True):
            start, count = bisect_left(ring.places, int.from_bytes(half)), len(ring.places)
            for i in range(start, start + count):
                worker = ring.workers[i % count]
                if worker not in found and is_open(worker):
                    found.append(worker)
                    break
        return found


def _place(worker: WorkerId, number: int, point: int) -> int:
    name = f"{number}/{point}/{worker}".encode()
    return int.from_bytes(blake2b(name, digest_size=8).digest())
