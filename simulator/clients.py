"""Who asks, and when: an open stream as recorded, or sessions that wait for their answers.

    open      every request at its `at_s`, whatever becomes of those before it
    closed    a session's first request at its `at_s`, each later one `think_s` after the answer
              before it ended here; with `at_once`, a session beyond these begins when one is over

A session whose request was refused asks it again when it was told to, twice at most, as OpenAI's
client does. After that, or when an answer failed, it goes on from there.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from simulator.job import Record
from simulator.workload.types import SimRequest

_RETRIES = 2


class Following(NamedTuple):
    """A request that another one brings, or that one again."""

    request: SimRequest
    is_same: bool


class Clients(Protocol):
    """`coming` in order of arrival; each request that ends may bring another one."""

    @property
    def coming(self) -> Iterator[SimRequest]: ...

    def after(self, record: Record, now_s: float) -> Following | None:
        """What is asked next because that request has ended now."""
        ...


class OpenClients:
    """Implements Clients."""

    def __init__(self, requests: Sequence[SimRequest]) -> None:
        self.coming = iter(requests)

    def after(self, record: Record, now_s: float) -> Following | None:
        return None


class ClosedSessions:
    """Implements Clients. Requests without a session are sessions of one."""

    def __init__(self, requests: Sequence[SimRequest], at_once: int | None = None) -> None:
        self._turns: dict[str, deque[SimRequest]] = {}
        alone: list[SimRequest] = []
        for request in requests:
            if request.session:
                self._turns.setdefault(request.session, deque()).append(request)
            else:
                alone.append(request)
        self._open = {session: turns.popleft() for session, turns in self._turns.items()}
        self._refusals: Counter[str] = Counter()
        firsts = sorted([*self._open.values(), *alone], key=lambda request: request.at_s)
        most = len(firsts) if at_once is None else at_once
        self.coming = iter(firsts[:most])
        self._later = deque(firsts[most:])

    def after(self, record: Record, now_s: float) -> Following | None:
        session = record.session
        if record.retry_after_s is not None and session and self._refusals[session] < _RETRIES:
            self._refusals[session] += 1
            return Following(replace(self._open[session], at_s=now_s + record.retry_after_s), True)
        self._refusals.pop(session, None)
        turns = self._turns.get(session)
        if turns:
            turn = self._open[session] = turns.popleft()
            return Following(replace(turn, at_s=now_s + (turn.think_s or 0.0)), False)
        self._turns.pop(session, None)
        if not self._later:
            return None
        return Following(replace(self._later.popleft(), at_s=now_s), False)


def make_clients(requests: Sequence[SimRequest], *, closed: bool, at_once: int | None) -> Clients:
    """As the run's spec says."""
    return ClosedSessions(requests, at_once) if closed else OpenClients(requests)
