"""What a number of sessions in closed loops gets: the load is how many are open at once.

    begin, spread over half a minute | four turns for each that is open | so many judged | these end

The sessions that are open at first begin in their middle, each at a turn of its own, so that young
and old ones are mixed from the start. In their first turns they find less in caches than sessions
that were simulated from their beginning would, so these turns are not judged.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from random import Random

from router.policies.base import Slo
from simulator.cluster import Cluster
from simulator.job import Record
from simulator.misses import kept
from simulator.spec import SimSpec
from simulator.workload.types import SimRequest

BEGIN_S = 30.0
_WARM_TURNS = 4
_BEGINNING_TURNS = 8
"""Of each session while others begin, for those whose turns are short."""
_SPARE = 1.25
"""More sessions than are needed on average: an unlucky run may have many short ones."""


@dataclass(frozen=True, slots=True)
class Attained:
    """Turns/s that came in the judged part, and the share of them that kept both targets: if the
    run was ended early, at most.
    """

    rate_per_s: float
    share: float


def sessions_needed(sessions: int, judged: int, mean_turns: float) -> int:
    """How many a run takes that keeps `sessions` open until `judged` turns were."""
    turns = (_BEGINNING_TURNS + _WARM_TURNS + 1) * sessions + judged
    return sessions + ceil(_SPARE * turns / mean_turns)


def run_sessions(
    spec: SimSpec, requests: Sequence[SimRequest], sessions: int, share: float, judged: int
) -> Attained:
    """`requests` of whole sessions, until `judged` turns have ended, or there are no more
    sessions to begin; ended early once `share` is missed.
    """
    spec = replace(spec, closed_sessions=True, sessions=sessions, samples=0)
    requests = _begin_midway(requests, sessions, Random(spec.seed))
    cluster, most = Cluster(spec), (1 - share) * (judged + sessions) + 1e-9
    judge = _Judge(spec.slo, requests, sessions, judged, cluster.now_s)
    cluster.run(
        requests,
        on_asked=judge.asked,
        enough=lambda record: judge.note(record) or judge.misses > most,
    )
    counted = judged + sessions if judge.misses > most else max(1, judge.judged)
    return Attained(judge.rate_per_s, 1 - judge.misses / counted if judge.judged else 0.0)


def _begin_midway(
    requests: Sequence[SimRequest], sessions: int, random: Random
) -> list[SimRequest]:
    """Without the first turns, from none to all but one, of each session that is open at first."""
    turns: dict[str, list[SimRequest]] = {}
    for request in requests:
        turns.setdefault(request.session, []).append(request)
    begun = list[SimRequest]()
    for i, each in enumerate(turns.values()):
        skipped = random.randrange(len(each)) if i < sessions else 0
        begun.append(replace(each[skipped], at_s=each[0].at_s, think_s=None))
        begun += each[skipped + 1 :]
    return sorted(begun, key=lambda request: request.at_s)


class _Judge:
    """Tells the turns that are judged from the rest. They came when the sessions were under way,
    and before enough of them had ended; what each session waits for then is the last.

    A turn is one request of load however often it is asked, and came when it was asked first. One
    that was refused has missed: by its last try it is later than its target, or not served at all.
    """

    def __init__(
        self,
        slo: Slo,
        requests: Sequence[SimRequest],
        sessions: int,
        judged: int,
        now_s: Callable[[], float],
    ) -> None:
        self._slo = slo
        self._wanted = judged
        self._now_s = now_s
        self._left = Counter(request.session for request in requests)
        self._to_begin = len(self._left) - sessions
        self._sessions = sessions
        self._warm = _WARM_TURNS * sessions
        self._came: set[str] = set()
        self._waiting: dict[str, float] = {}
        """Sessions with an answer to come, and when they asked for it first."""
        self._refused: set[str] = set()
        """Of these, those whose turn was refused before."""
        self._last: set[str] | None = None
        """Of these, when enough had ended, those whose answer is still to come."""
        self._from_s = inf
        self._until_s = inf
        self.judged = self.misses = 0

    @property
    def rate_per_s(self) -> float:
        """Of those that are judged, so far."""
        span_s = min(self._until_s, self._now_s()) - self._from_s
        return self.judged / span_s if span_s > 0 else 0.0

    def asked(self, request: SimRequest) -> None:
        """One has come, perhaps again."""
        self._waiting.setdefault(request.session, request.at_s)
        self._came.add(request.session)

    def note(self, record: Record) -> bool:
        """A try has ended; answers whether all turns that are judged have."""
        session, last = record.session, self._last
        if record.is_asked_again:
            self._refused.add(session)
            return False
        came_s = self._waiting.pop(session)
        if came_s > self._from_s and (last is None or session in last):
            self.judged += 1
            self.misses += session in self._refused or not kept(record, self._slo)
        self._refused.discard(session)
        self._left[session] -= 1
        self._to_begin -= not self._left[session]
        self._warm -= len(self._came) >= self._sessions
        if self._warm == 0:
            self._from_s = self._now_s()
        if last is not None:
            last.discard(session)
            return not last
        if self._warm < 0 and (self.judged >= self._wanted or self._to_begin <= 0):
            self._last, self._until_s = set(self._waiting), self._now_s()
        return self._last is not None and not self._last
