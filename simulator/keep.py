"""KV of a session kept between its turns, for as long as somebody says: held by leases, as all is.

    answer ended -> pinned where its prompt lies -> its time is over: evictable again
                          | next turn asked: stays, until that has its first token
                          | others need the room and nothing runs: the newest pins go first

How long is a policy's to say, and none is production's: it is a what-if (`SimSpec.keep`).
"""

from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from kv_transfer.leases import Lease
from simulator.events import Events
from simulator.fleet import Member
from simulator.job import Leg
from simulator.sequence import ANY, SimSequence
from simulator.workload.types import SimRequest

_LOOK_S = 0.05


class KeepPolicy(Protocol):
    """Says how long; told what passes. All times in seconds. With `by_session`, turns wait in the
    order in which their sessions began, else in which they came.
    """

    by_session: bool

    def keep_s(self, request: SimRequest, memory_share: float, queue_s: float) -> float:
        """After the answer to `request`, which waited for `queue_s`, and whose context fills that
        share of a worker's KV; 0 keeps nothing, inf until the next turn.
        """
        ...

    def returned(self, pause_s: float) -> None:
        """A session's next turn came so long after its last answer."""
        ...


@dataclass(slots=True)
class _Kept:
    """A session between two turns: since when, and what holds its KV where."""

    ended_at_s: float
    leases: list[tuple[Member, Lease]] = field(default_factory=list)
    returned: bool = False


class Keeper:
    """Of a whole run. Sessions by name."""

    def __init__(self, events: Events, policy: KeepPolicy) -> None:
        self._events = events
        self._policy = policy
        self._kept: dict[str, _Kept] = {}
        self._began_s: dict[str, float] = {}
        self._watched: set[str] = set()

    def asked(self, session: str) -> None:
        """A turn arrives: what was kept for it stays until it has begun."""
        self._began_s.setdefault(session, self._events.now_s())
        kept = self._kept.get(session)
        if kept is not None and not kept.returned:
            kept.returned = True
            self._policy.returned(self._events.now_s() - kept.ended_at_s)

    def submitted(self, member: Member) -> None:
        """One more waits there."""
        if self._policy.by_session:
            member.worker.scheduler.waiting.sort(key=self._turn_of)

    def _turn_of(self, sequence: SimSequence) -> float:
        leg = sequence.leg
        return self._began_s[leg.job.request.session] if isinstance(leg, Leg) else 0.0

    def begun(self, session: str) -> None:
        """It has its first token, and its own references."""
        kept = self._kept.pop(session, None)
        if kept is not None:
            self._release(kept)

    def ended(self, request: SimRequest, members: list[Member], queue_s: float) -> None:
        """An answer has ended; its prompt lies in the caches of these workers: those of its last
        attempt that are still up.
        """
        now_s = self._events.now_s()
        kept = self._kept[request.session] = _Kept(now_s)
        if not members:
            return
        spec = members[0].worker.spec
        tokens = request.prompt_tokens + request.output_tokens
        share = tokens / (spec.block_size * spec.kv_blocks)
        keep_s = self._policy.keep_s(request, share, queue_s)
        if keep_s <= 0:
            return
        for member in members:
            lease = member.leases.open_cached(ANY, request.hashes, request.session)
            lease.expires_at_s = inf
            kept.leases.append((member, lease))
            self._watch(member)
        if keep_s < inf:
            self._events.at(now_s + keep_s, self._time_over, (request.session, kept))

    def _time_over(self, which: tuple[str, _Kept]) -> None:
        session, kept = which
        if self._kept.get(session) is kept and not kept.returned:
            self._release(kept)

    def _release(self, kept: _Kept) -> None:
        leases, kept.leases = kept.leases, []
        for member, lease in leases:
            member.leases.abort(lease.lease_id)
            member.worker.look()
            member.queue.look()

    # -- room for others ------------------------------------------------------------------------

    def _watch(self, member: Member) -> None:
        if member.record.incarnation not in self._watched:
            self._watched.add(member.record.incarnation)
            self._events.at(self._events.now_s() + _LOOK_S, self._make_room, member)

    def _make_room(self, member: Member) -> None:
        """Let the newest go while what is pinned keeps others from going on."""
        self._watched.discard(member.record.incarnation)
        if member.is_dead:
            return  # what it held is gone, and nobody runs there
        held = [k for k in self._kept.values() if any(m is member for m, _ in k.leases)]
        load = member.worker.load()
        stuck = not load.running and load.waiting
        if held and (stuck or load.free_blocks < load.running):
            self._release(max(held, key=lambda kept: kept.ended_at_s))
            held.pop()
        if held:
            self._watch(member)
