"""A router that does not keep to the rules: legs submitted one by one, with any handle."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from core.ids import SequenceId
from core.messages import (
    Accepted,
    DecodeSubmit,
    Handoff,
    LegFailed,
    LegTokens,
    PrefillSubmit,
    Rejected,
    RenewLeases,
)
from router.client import Leg, LegEvent
from router.move import handoff_to
from router.types import GenerateRequest
from tests.faults.rig import LEASE_S, Rig

_LEG_S = 10.0


@dataclass(slots=True)
class LegHeard:
    """What a worker said of one leg."""

    tokens: list[int] = field(default_factory=list)
    accepted: Accepted | None = None
    failed: LegFailed | Rejected | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, leg: Leg, event: LegEvent) -> None:
        """router.client.LegListener"""
        match event:
            case Accepted():
                self.accepted = event
            case LegTokens():
                self.tokens += event.tokens
                prefill = self.accepted is not None and self.accepted.lease_id is not None
                if prefill or event.finish is not None:
                    self.over.set()
            case LegFailed() | Rejected():
                self.failed = event
                self.over.set()
            case _:
                raise AssertionError(event)

    async def end(self) -> "LegHeard":
        async with asyncio.timeout(_LEG_S):
            await self.over.wait()
        return self


@asynccontextmanager
async def prefilled(
    rig: Rig, name: str
) -> AsyncIterator[tuple[GenerateRequest, SequenceId, Handoff]]:
    """A prompt whose prefill has ended, and the handle of its lease, kept alive inside."""
    request = rig.request()
    sequence_id = SequenceId(request.request_id)
    link = rig.link(name)
    assert link is not None
    heard = LegHeard()
    leg = link.submit(
        lambda number: PrefillSubmit(
            number=number,
            sequence_id=sequence_id,
            tokens=request.prompt_tokens,
            output_position=0,
            sampling=request.sampling,
            deadline_s=request.deadline_s,
        ),
        heard,
        0,
        0,
    )
    await heard.end()
    assert heard.accepted is not None
    assert heard.accepted.lease_id is not None
    lease_id = heard.accepted.lease_id

    async def renew() -> None:
        while True:
            link.send(RenewLeases(lease_ids=(lease_id,)))
            await asyncio.sleep(LEASE_S / 3)

    renewing = asyncio.create_task(renew())
    try:
        handoff = handoff_to(link, lease_id)
        assert handoff is not None
        yield request, sequence_id, handoff
    finally:
        renewing.cancel()
        leg.cancel("the test has seen enough")


async def decode_leg(
    rig: Rig, name: str, request: GenerateRequest, sequence_id: SequenceId, handoff: Handoff
) -> LegHeard:
    """All a decode worker says of a leg with this handle."""
    link = rig.link(name)
    assert link is not None
    heard = LegHeard()
    leg = link.submit(
        lambda number: DecodeSubmit(
            number=number,
            sequence_id=sequence_id,
            tokens=request.prompt_tokens,
            output_position=0,
            sampling=request.sampling,
            deadline_s=request.deadline_s,
            handoff=handoff,
        ),
        heard,
        0,
        0,
    )
    await heard.end()
    link.finish(leg)
    return heard
