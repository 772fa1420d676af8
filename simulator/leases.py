"""Leases of simulated workers: the production table, and the renewals of whoever reads.

finished -> renewed by its reader each third of `lease_s`, while that lives and is in reach
         -> nobody renews: expired `lease_s` after the last time, its blocks back
"""

from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.leases import Lease, LeaseTable
from simulator.events import Events


@dataclass(frozen=True, slots=True)
class Renewal:
    """Of one lease that lives by it. `in_reach`: whether its reader's word gets to the owner."""

    events: Events
    table: LeaseTable
    lease: Lease
    in_reach: Callable[[], bool]
    on_freed: Callable[[], None]
    """An expiry has given blocks back."""

    def begin(self) -> None:
        """The lease was finished or opened on what is cached, just now."""
        self.events.at(self.events.now_s() + self.table.lease_s / 3, Renewal._tick, self)

    def _tick(self) -> None:
        table, lease, now_s = self.table, self.lease, self.events.now_s()
        if table.get(lease.lease_id) is None:
            return
        if self.in_reach():
            table.renew([lease.lease_id], lease.reader)
        elif lease.expires_at_s <= now_s:
            table.sweep()
            self.on_freed()
            return
        next_s = now_s + table.lease_s / 3
        if not self.in_reach():
            next_s = min(next_s, lease.expires_at_s)
        self.events.at(next_s, Renewal._tick, self)
