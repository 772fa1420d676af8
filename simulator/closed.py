"""What a number of sessions in closed loops gets: the load is how many are open at once.

    begin, spread over a minute | as many have ended as are open | judged | the last begins | end

Three times as many sessions run as are open at once. Before the first of those marks all are at the
same stage and caches are empty, after the last one fewer are open; neither part is judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from router.policies.base import Slo
from simulator.cluster import Cluster
from simulator.job import Record
from simulator.spec import SimSpec
from simulator.workload.types import SimRequest

BEGIN_S = 60.0
GENERATIONS = 3


@dataclass(frozen=True, slots=True)
class Attained:
    """Requests/s that came in the judged part, and the share of them that kept both targets: if the
    run was ended early, at most.
    """

    rate_per_s: float
    share: float


def run_sessions(
    spec: SimSpec, requests: Sequence[SimRequest], sessions: int, share: float
) -> Attained:
    """`requests` of `GENERATIONS * sessions` whole sessions, ended early once `share` is missed."""
    judge = _Judge(spec.slo, requests, sessions, share)
    spec = replace(spec, closed_sessions=True, sessions=sessions, samples=0)
    Cluster(spec).run(requests, enough=judge.note)
    judged = [record for record in judge.records if record.at_s > judge.from_s]
    judged = [record for record in judged if record.at_s <= judge.until_s]
    span_s = max((r.at_s for r in judged), default=0.0) - judge.from_s
    kept = sum(_kept(record, spec.slo) for record in judged)
    rate_per_s = len(judged) / span_s if span_s > 0 else 0.0
    if judge.missed_early:
        return Attained(rate_per_s, 1 - judge.misses / len(requests))
    return Attained(rate_per_s, kept / max(1, len(judged)))


class _Judge:
    """Keeps the records, and tells the judged part from the rest."""

    def __init__(
        self, slo: Slo, requests: Sequence[SimRequest], sessions: int, share: float
    ) -> None:
        self._slo = slo
        self._left: dict[str, int] = {}
        for request in requests:
            self._left[request.session] = self._left.get(request.session, 0) + 1
        self._sessions = sessions
        self._more = len(self._left) - sessions
        self._over = 0
        self._most = (1 - share) * len(requests)
        self.records: list[Record] = []
        self.misses = 0
        self.missed_early = False
        self.from_s = self.until_s = float("inf")

    def note(self, record: Record) -> bool:
        """Whether the share can no longer be kept, however many are still to be judged."""
        self.records.append(record)
        self._left[record.session] -= 1
        if not self._left[record.session]:
            self._over += 1
            now_s = max(record.at_s, record.end_s if record.outcome == "ok" else record.at_s)
            if self._over == self._sessions:
                self.from_s = now_s
            if self._over == self._more:
                self.until_s = now_s
        self.misses += self.from_s < record.at_s <= self.until_s and not _kept(record, self._slo)
        self.missed_early = self.misses > self._most
        return self.missed_early


def _kept(record: Record, slo: Slo) -> bool:
    in_time = record.ttft_s <= slo.ttft_s and record.tpot_s <= slo.tpot_s
    return record.outcome == "ok" and in_time
