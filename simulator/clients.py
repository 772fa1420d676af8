"""Who asks, and when: an open stream as recorded, or sessions that wait for their answers.

    open      every request at its `at_s`, whatever becomes of those before it
    closed    a session's first request at its `at_s`, each later one `think_s` after the answer
              before it ended here; with `at_once`, a session beyond these begins when one is over

An answer that was refused or failed is over too: its session goes on from there.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from simulator.workload.types import SimRequest


class Clients(Protocol):
    """`coming` in order of arrival; each request that ends may bring another one."""

    @property
    def coming(self) -> Iterator[SimRequest]: ...

    def after(self, session: str, now_s: float) -> SimRequest | None:
        """What is asked next because a request of that session has ended now."""
        ...


class OpenClients:
    """Implements Clients."""

    def __init__(self, requests: Sequence[SimRequest]) -> None:
        self.coming = iter(requests)

    def after(self, session: str, now_s: float) -> SimRequest | None:
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
        firsts = [turns.popleft() for turns in self._turns.values()]
        firsts = sorted([*firsts, *alone], key=lambda request: request.at_s)
        most = len(firsts) if at_once is None else at_once
        self.coming = iter(firsts[:most])
        self._later = deque(firsts[most:])

    def after(self, session: str, now_s: float) -> SimRequest | None:
        turns = self._turns.get(session)
        if turns:
            turn = turns.popleft()
            return replace(turn, at_s=now_s + (turn.think_s or 0.0))
        self._turns.pop(session, None)
        return replace(self._later.popleft(), at_s=now_s) if self._later else None


def make_clients(requests: Sequence[SimRequest], *, closed: bool, at_once: int | None) -> Clients:
    """As the run's spec says."""
    return ClosedSessions(requests, at_once) if closed else OpenClients(requests)
