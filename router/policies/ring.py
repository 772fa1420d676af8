"""Two consistent-hash rings over the workers: where a key has its two homes.

DualMap (ICLR'26, arXiv 2602.06502): each key has two candidates, its clockwise successors by two
independent hashes. When a worker comes or goes only keys next to it move, on one of the rings at a
time, so the other home keeps their cache. A key is a block hash: its halves are the two hashes.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from hashlib import blake2b

from core.ids import BlockHash, WorkerId

_DIGESTS = 2
_POINT_BYTES = 8
"""So 16 points of each worker on each ring: homes within about a quarter of the mean. A worker that
comes or goes costs about a millisecond among 1,024.
"""


class _Ring:
    """Points in order, and whose each is."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.points: list[int] = []
        self.owners: dict[int, WorkerId] = {}

    def add(self, workers: Sequence[WorkerId]) -> None:
        for worker in workers:
            points = self._points_of(worker)
            self.points += points
            self.owners.update(dict.fromkeys(points, worker))
        self.points.sort()  # mostly sorted already

    def remove(self, workers: Sequence[WorkerId]) -> None:
        for worker in workers:
            for point in self._points_of(worker):
                del self.owners[point]
        self.points = [point for point in self.points if point in self.owners]

    def _points_of(self, worker: WorkerId) -> list[int]:
        """64 bits each: two workers share one about once in 10^10 fleets of 1,024."""
        name = worker.encode()
        digests = b"".join(
            blake2b(name, salt=bytes([self._number, i])).digest() for i in range(_DIGESTS)
        )
        starts = range(0, len(digests), _POINT_BYTES)
        return [int.from_bytes(digests[i : i + _POINT_BYTES]) for i in starts]


class TwoRings:
    """`follow` the pool, then ask for `homes`."""

    def __init__(self) -> None:
        self._pool: Sequence[WorkerId] = ()
        self._rings = (_Ring(0), _Ring(1))

    def follow(self, pool: Sequence[WorkerId]) -> None:
        """Take in who came, leave out who went. At once when `pool` is the one known."""
        if pool is self._pool:
            return
        new, old = set(pool), set(self._pool)
        self._pool = pool
        for ring in self._rings:
            ring.remove([worker for worker in old if worker not in new])
            ring.add([worker for worker in pool if worker not in old])

    def homes(self, key: BlockHash, is_open: Callable[[WorkerId], bool]) -> list[WorkerId]:
        """Up to two different open workers: the key's successor on each ring, or who follows."""
        found: list[WorkerId] = []
        for ring, half in zip(self._rings, (key[:8], key[8:]), strict=True):
            start, count = bisect_left(ring.points, int.from_bytes(half)), len(ring.points)
            for i in range(start, start + count):
                worker = ring.owners[ring.points[i % count]]
                if worker not in found and is_open(worker):
                    found.append(worker)
                    break
        return found
