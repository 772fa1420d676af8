"""One live migration of a running sequence, as its router drives and measures it.

    router -> source       Offer          -> Offered: a lease, or why not
    router -> destination  DecodeSubmit   -> Accepted, or Rejected
    source -> router       its tokens go on, then Moved
    destination -> router  its tokens, perhaps before Moved: kept until then

Until Moved the sequence is the source's, and nothing that befalls the destination touches it. From
Moved on it is the destination's alone.
"""

import asyncio
import logging
from collections.abc import Callable

from core.clock import Clock
from core.errors import WorkerLost
from core.ids import LeaseId
from core.messages import Handoff, LegFailed, LegTimes, LegTokens, Offer, Offered, Rejected
from router.client import Leg, LegEvent, WorkerLink
from router.placement import Placement
from router.types import MigrationReport

log = logging.getLogger(__name__)

OpenLeg = Callable[[Placement, Handoff], Leg]
"""Submits the sequence's decode leg where it was placed. Raises WorkerLost."""


class Move:
    """`report` is set once, when the migration is over, in one way or the other."""

    def __init__(self, source: Leg, to: Placement, open_leg: OpenLeg, clock: Clock) -> None:
        self._source = source
        self._to = to
        self._open_leg = open_leg
        self._clock = clock
        self._began_s = clock.now_s()
        self._tokens_meanwhile = 0
        self.leg: Leg | None = None
        """The destination's, once it is submitted."""
        self.early: list[LegTokens] = []
        """What the destination said before Moved was heard."""
        self.moved = False
        self.report: asyncio.Future[MigrationReport] = asyncio.get_running_loop().create_future()
        source.link.send(Offer(number=source.number))

    @property
    def over(self) -> bool:
        return self.report.done()

    def offered(self, event: Offered) -> None:
        """The source's answer: on to the destination."""
        if self.over or self.leg is not None:
            return
        handoff = handoff_to(self._source.link, event.lease_id, live=True)
        if handoff is None:
            self.end(event.message or "its worker was lost")
            return
        try:
            self.leg = self._open_leg(self._to, handoff)
        except WorkerLost as error:
            self.end(error.message)

    def hear_destination(self, event: LegEvent) -> None:
        """Before Moved."""
        match event:
            case LegTokens():
                self.early.append(event)
            case Rejected() | LegFailed():
                self.end(event.message)

    def hear_source(self, event: LegTokens) -> None:
        """It goes on meanwhile."""
        self._tokens_meanwhile += len(event.tokens)

    def end(self, reason: str, pause_s: float = 0.0, times: LegTimes | None = None) -> None:
        """Say how it went; empty `reason`: the destination has spoken. Before Moved it is off."""
        if self.over:
            return
        if self.leg is not None and not self.moved:
            self.leg.cancel(reason)
        times = times or LegTimes()
        report = MigrationReport(
            moved=self.moved,
            reason=reason,
            source=self._source.link.record.worker_id,
            destination=self._to.link.record.worker_id,
            pause_s=pause_s,
            total_s=self._clock.now_s() - self._began_s,
            tokens_meanwhile=self._tokens_meanwhile,
            transfer_bytes=times.transfer_bytes,
            transfer_blocks=times.transfer_blocks,
            transfer_s=times.transfer_s,
        )
        log.info("migration_ended report=%s", report)
        self.report.set_result(report)


def handoff_to(link: WorkerLink, lease_id: LeaseId | None, *, live: bool = False) -> Handoff | None:
    """The way to a lease on a worker; None without a lease, or when the worker was just lost."""
    view = link.view
    if view is None or lease_id is None:
        return None
    return Handoff(
        owner_id=view.hello.worker_id,
        owner_address=view.hello.peer_address,
        owner_incarnation=view.hello.incarnation,
        lease_id=lease_id,
        live=live,
    )
