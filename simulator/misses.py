"""Requests that missed a target, counted while a run goes on: one that missed too many may end."""

from router.policies.base import Slo
from simulator.job import Record


def kept(record: Record, slo: Slo, *, tpot: bool = True) -> bool:
    """Whether a request was served within its targets, of which that of TPOT may not count."""
    return (
        record.outcome == "ok"
        and record.ttft_s <= slo.ttft_s
        and (not tpot or record.tpot_s <= slo.tpot_s)
    )


class Misses:
    """Of the requests from `since_s` on, `counted` in all, of which a `share` shall be kept."""

    def __init__(
        self, slo: Slo, *, since_s: float, counted: int, share: float, tpot: bool = True
    ) -> None:
        self._slo = slo
        self._since_s = since_s
        self._counted = counted
        self._most = (1 - share) * counted + 1e-9
        self._tpot = tpot
        self._count = 0
        self._late: set[int] = set()
        """By identity, those counted that have not ended yet."""

    def late(self, record: Record) -> bool:
        """One that has no token yet is past its target; answers as `note` will."""
        if record.at_s >= self._since_s:
            self._count += 1
            self._late.add(id(record))
        return self.too_many

    def note(self, record: Record) -> bool:
        """One has ended; answers whether so many have missed that the share is."""
        if id(record) in self._late:
            self._late.remove(id(record))
        elif record.at_s >= self._since_s and not kept(record, self._slo, tpot=self._tpot):
            self._count += 1
        return self.too_many

    def never_ended(self, count: int) -> None:
        """So many never will."""
        self._count += count - len(self._late)
        self._late.clear()

    @property
    def too_many(self) -> bool:
        """Whether the share is missed already."""
        return self._count > self._most

    @property
    def share(self) -> float:
        """Of those counted that kept the targets, or still can."""
        return max(0.0, 1 - self._count / self._counted)
