"""The bytes under way at once, and how long a read may take beside them.

A network shared by many reads is slow for each of them, and a read that is given up for it is tried
again into the same congestion. So what a read may take grows with the most bytes that were under
way at once while it was, and no further: they have different targets in one arena, so that a read
that never ends is always found out.
"""

from dataclasses import dataclass

_SLOWEST_BYTES_PER_S = 50e6
"""Well below what 1 Gbit/s Ethernet carries."""


def patience_s(timeout_s: float, nbytes: int) -> float:
    """How long to wait for `nbytes` that move together: `timeout_s`, and what they take at the
    slowest.
    """
    return timeout_s + nbytes / _SLOWEST_BYTES_PER_S


@dataclass(slots=True, eq=False)
class Share:
    """What is under way for one read; `beside` the most bytes at once while it was, its own too."""

    nbytes: int
    beside: int


class Traffic:
    """Each share is begun and ended once."""

    def __init__(self) -> None:
        self._shares: set[Share] = set()
        self._nbytes = 0

    def begin(self, nbytes: int) -> Share:
        """More is under way, beside all that is already."""
        self._nbytes += nbytes
        for share in self._shares:
            share.beside = max(share.beside, self._nbytes)
        share = Share(nbytes, self._nbytes)
        self._shares.add(share)
        return share

    def end(self, share: Share) -> None:
        self._shares.remove(share)
        self._nbytes -= share.nbytes
