"""Links that KV moves over: first come, first served, at their bandwidth.

A chunk crosses all links of its path at once and has arrived when the slowest, with what was before
it there, is through. So transfers that share a NIC or the uplink of a network domain slow each
other, and what they do not share does not.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Link:
    """One direction of a NIC, or of a domain's uplink."""

    bytes_per_s: float
    free_s: float = 0.0
    """When all that was sent so far is through."""
    carried_bytes: int = 0

    def send(self, now_s: float, nbytes: int) -> float:
        """When `nbytes` more are through."""
        begins_s = self.free_s if self.free_s > now_s else now_s
        self.free_s = begins_s + nbytes / self.bytes_per_s
        self.carried_bytes += nbytes
        return self.free_s


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
    return max([link.send(now_s, nbytes) for link in path])
