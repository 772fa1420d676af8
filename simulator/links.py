"""Links that KV moves over: first come, first served, at their bandwidth.

A chunk comes to a link of its path when the one before begins to let it through, and has arrived
when the slowest, with what was before it there, is through. So transfers that share a NIC or the
uplink of a network domain slow each other, and what they do not share does not. While a chunk waits
for one link, those behind it are free for what comes there sooner:

    ..####....##......    when a link is busy with what was sent so far
    .###########......    and with five more, that come at its second moment
"""

from bisect import bisect_right
from dataclasses import dataclass, field


@dataclass(slots=True)
class Link:
    """One direction of a NIC, or of a domain's uplink."""

    bytes_per_s: float
    carried_bytes: int = 0
    _begins_s: list[float] = field(default_factory=list)
    _ends_s: list[float] = field(default_factory=list)
    """Of the times it is busy that are not over, in order and apart."""

    def carry(self, now_s: float, from_s: float, nbytes: int) -> tuple[float, float]:
        """When `nbytes` more, which come at `from_s`, begin to pass, and when they are through."""
        self.carried_bytes += nbytes
        begins, ends, left_s = self._begins_s, self._ends_s, nbytes / self.bytes_per_s
        over = bisect_right(ends, now_s)
        if over:
            del begins[:over], ends[:over]
        first, begin_s = bisect_right(ends, from_s), from_s
        while first < len(ends) and begins[first] <= begin_s:
            begin_s = ends[first]
            first += 1
        last, end_s = first, begin_s
        while last < len(ends) and begins[last] < end_s + left_s:
            left_s -= begins[last] - end_s
            end_s = ends[last]
            last += 1
        end_s += left_s
        if end_s > begin_s:
            begins[first:last], ends[first:last] = [begin_s], [end_s]
            if first and ends[first - 1] == begin_s:
                del ends[first - 1], begins[first]
        return begin_s, end_s


@dataclass(slots=True)
class Port:
    """A worker's way into the network."""

    domain: int
    sent: Link
    received: Link
    cut_until_s: float = 0.0
    """Until then nothing comes through."""


class Network:
    """Ports in domains; between two domains also the uplinks of both are crossed."""

    def __init__(self, uplink_bytes_per_s: float) -> None:
        self._uplink_bytes_per_s = uplink_bytes_per_s
        self._uplinks: dict[int, tuple[Link, Link]] = {}

    def port(self, domain: int, nic_bytes_per_s: float) -> Port:
        """A NIC in that domain."""
        if domain not in self._uplinks:
            rate = self._uplink_bytes_per_s
            self._uplinks[domain] = Link(rate), Link(rate)
        return Port(domain, Link(nic_bytes_per_s), Link(nic_bytes_per_s))

    def path(self, source: Port, target: Port) -> tuple[Link, ...]:
        """The links from one to the other."""
        if source.domain == target.domain:
            return source.sent, target.received
        up, down = self._uplinks[source.domain][0], self._uplinks[target.domain][1]
        return source.sent, up, down, target.received


def send(path: tuple[Link, ...], now_s: float, nbytes: int) -> float:
    """When `nbytes` that start now have arrived."""
    begins_s = arrives_s = now_s
    for link in path:
        begins_s, through_s = link.carry(now_s, begins_s, nbytes)
        arrives_s = max(arrives_s, through_s)
    return arrives_s
