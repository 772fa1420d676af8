"""Workers that fail, or are far slower than their peers, are left out of placement for a while.

    in         -- failures in a row, or slow for a while -->                      ejected
    ejected    -- its time is up -->                                             half open
    half open  -- one request at a time may go there: it is answered in time -->        in
    half open  -- that one fails, or is slow again -->        ejected, for twice as long

As Envoy's outlier detection and the circuit breakers of other gateways do it: a share of a pool is
the most that is ejected, the last worker never is, and ejection is a hint: when all others have
failed a request, it goes to an ejected one all the same. A worker's no (it rejects) is no failure.
A first token ends a row of failures, but not one of faults, which is what a worker says went wrong
in itself: an engine that breaks in mid-answer begins each of them well.

Speed is what an answer took over what it was predicted to take, so prompts of all lengths compare;
of several answers the geometric mean that forgets. Workers are named by their incarnation: one that
has restarted starts afresh.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from core.ids import Incarnation
from router.watcher import EjectReason, FlowWatcher

_ONE_EVENT_S = 0.1
"""Failures within so long of each other are one: a stream that ends takes all its legs with it."""
_PEERS = 16
"""Looked at for a median, whatever the size of the pool."""
_ENOUGH_ANSWERS = 8
_NEW_SHARE = 0.2
_FLOOR_S = 0.01
"""Times below count as this: of a few milliseconds, jitter is a multiple."""
_FORGIVEN_AFTER = 10
"""Well for so many times its last ejection, and a worker's next one is short again."""
_MAX_KNOWN = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class OutlierRules:
    """When to eject, and for how long."""

    failures: int
    """In a row; 0 never ejects, for whatever reason."""
    eject_s: float
    """The first time; each further one takes twice as long."""
    max_eject_s: float = 300.0
    slow_factor: float = 3.0
    """Slow: that many times the median of its peers."""
    slow_s: float = 10.0
    """Slow for so long."""
    max_share: float = 1 / 3
    """Of a pool; one worker at least, if there is another."""
    probe_s: float = 30.0
    """A probe that has not ended by then is followed by another one."""


NO_OUTLIERS = OutlierRules(failures=0, eject_s=1.0)


def may_eject(pool: int, ejected: int, max_share: float) -> bool:
    """Whether one more of a pool of so many may be, when so many are."""
    return ejected < max(1, int(max_share * pool)) and ejected + 1 < pool


def ejection_s(rules: OutlierRules, repeats: int) -> float:
    """How long, after `repeats` ejections shortly before."""
    return min(rules.max_eject_s, rules.eject_s * 2.0 ** min(repeats, 30))


@dataclass(slots=True)
class _Health:
    """What is known of one incarnation. Ejected while `reason` is set."""

    failures: int = 0
    faults: int = 0
    """Its own errors since an answer was complete; other failures are forgotten sooner."""
    failed_at_s: float = -1e9
    speed: float = 1.0
    answers: int = 0
    slow_since_s: float | None = None
    reason: EjectReason | None = None
    repeats: int = 0
    until_s: float = -1e9
    probe_until_s: float = -1e9

    def add(self, ratio: float) -> None:
        share = max(_NEW_SHARE, 1 / (self.answers + 1))
        self.speed *= (ratio / self.speed) ** share
        self.answers += 1


class Outliers:
    """One router's opinion. `peers` are the pool of the worker in question, itself included."""

    def __init__(self, rules: OutlierRules, watcher: FlowWatcher) -> None:
        self._rules = rules
        self._watcher = watcher
        self._known: dict[Incarnation, _Health] = {}
        self._ejected: dict[Incarnation, _Health] = {}
        self._turn = 0

    def shut(self, now_s: float) -> list[Incarnation]:
        """Those that take no request now: ejected, and not waiting for a probe."""
        return [
            incarnation
            for incarnation, health in self._ejected.items()
            if now_s < max(health.until_s, health.probe_until_s)
        ]

    def ejected_for(self, incarnation: Incarnation) -> EjectReason | None:
        """Why it is ejected, also while it is probed; None if it is not."""
        health = self._ejected.get(incarnation)
        return health.reason if health is not None else None

    def placed(self, incarnation: Incarnation, now_s: float) -> None:
        """A request goes there: the probe, if the worker is half open."""
        health = self._ejected.get(incarnation)
        if health is not None and now_s >= health.until_s:
            health.probe_until_s = now_s + self._rules.probe_s

    # -- what workers do ------------------------------------------------------------------------

    def failed(
        self,
        incarnation: Incarnation,
        peers: Sequence[Incarnation],
        now_s: float,
        *,
        fault: bool = False,
    ) -> None:
        """A leg failed there, or nothing came of it in time; `fault`: by the worker's own word."""
        health = self._health(incarnation)
        if now_s - health.failed_at_s < _ONE_EVENT_S:
            return
        health.failures += 1
        health.faults += fault
        health.failed_at_s = now_s
        probed = health.reason is not None and now_s >= health.until_s
        if probed or max(health.failures, health.faults) >= self._rules.failures:
            self._eject(incarnation, health, peers, EjectReason.FAILURES, now_s)

    def answered(self, incarnation: Incarnation, now_s: float) -> None:
        """A leg's first token came from there."""
        health = self._health(incarnation)
        health.failures = 0
        if health.reason is EjectReason.FAILURES and now_s >= health.until_s:
            self._readmit(incarnation, health)

    def completed(self, incarnation: Incarnation) -> None:
        """An answer is complete, and that worker had a part in it."""
        health = self._known.get(incarnation)
        if health is not None:
            health.faults = 0

    def took(
        self,
        incarnation: Incarnation,
        peers: Sequence[Incarnation],
        seconds: float,
        predicted_s: float,
        now_s: float,
    ) -> None:
        """An answer, or a part of one, took `seconds` there."""
        health, rules = self._health(incarnation), self._rules
        ratio = max(seconds, _FLOOR_S) / max(predicted_s, _FLOOR_S)
        usual = self._usual(incarnation, peers)
        if health.reason is EjectReason.SLOW and now_s >= health.until_s:
            if usual is None or ratio <= rules.slow_factor * usual:
                self._readmit(incarnation, health)
            else:
                self._eject(incarnation, health, peers, EjectReason.SLOW, now_s)
        if health.reason is not None:
            return
        health.add(ratio)
        if usual is None or health.speed <= rules.slow_factor * usual:
            health.slow_since_s = None
        elif health.slow_since_s is None:
            health.slow_since_s = now_s
        elif now_s - health.slow_since_s >= rules.slow_s and health.answers >= _ENOUGH_ANSWERS:
            self._eject(incarnation, health, peers, EjectReason.SLOW, now_s)

    # -- what follows ---------------------------------------------------------------------------

    def _eject(
        self,
        incarnation: Incarnation,
        health: _Health,
        peers: Sequence[Incarnation],
        reason: EjectReason,
        now_s: float,
    ) -> None:
        """Unless too many of its pool are."""
        others = sum(peer in self._ejected for peer in peers if peer != incarnation)
        rules = self._rules
        if not rules.failures or not may_eject(len(peers), others, rules.max_share):
            return
        last_s = ejection_s(rules, health.repeats - 1)
        if health.repeats and now_s - health.until_s > _FORGIVEN_AFTER * last_s:
            health.repeats = 0
        health.until_s, health.probe_until_s = now_s + ejection_s(rules, health.repeats), -1e9
        health.repeats += 1
        health.reason = reason
        health.failures = health.faults = 0
        self._ejected[incarnation] = health
        self._watcher.ejected(reason)

    def _readmit(self, incarnation: Incarnation, health: _Health) -> None:
        del self._ejected[incarnation]
        health.reason, health.slow_since_s, health.answers, health.speed = None, None, 0, 1.0
        self._watcher.readmitted()

    def _usual(self, incarnation: Incarnation, peers: Sequence[Incarnation]) -> float | None:
        """The median speed of some peers; None while too little is known of any."""
        self._turn += 1
        speeds: list[float] = []
        known, count = self._known, len(peers)
        for turn in range(self._turn, self._turn + min(count, _PEERS)):
            peer = peers[turn % count]
            health = known.get(peer)
            if health is None or health.answers < _ENOUGH_ANSWERS // 2:
                continue
            if health.reason is None and peer != incarnation:
                speeds.append(health.speed)
        return median(speeds) if speeds else None

    def _health(self, incarnation: Incarnation) -> _Health:
        health = self._known.get(incarnation)
        if health is None:
            if len(self._known) >= _MAX_KNOWN:
                self._forget(next(iter(self._known)))
            health = self._known[incarnation] = _Health()
        return health

    def _forget(self, incarnation: Incarnation) -> None:
        del self._known[incarnation]
        self._ejected.pop(incarnation, None)
