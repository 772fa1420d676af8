"""The gRPC door of the reader's side: one PeerStream to one incarnation of one owner."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc

from core.channel import CHANNEL_OPTIONS, STREAM_ERRORS, describe_break, heed_cancel
from core.errors import TransferFailed
from core.ids import Incarnation, LeaseId
from core.messages import PROTOCOL_MAJOR, Handoff
from core.outbox import Outbox
from kv_transfer.codec import UnknownMessage, from_owner_from_wire, from_reader_to_wire
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    FromReader,
    LeaseOutcome,
    PeerHello,
    Renew,
    Renewed,
)
from kv_transfer.transport import Transport
from wire import peer_pb2, peer_pb2_grpc

log = logging.getLogger(__name__)

Stream = grpc.aio.StreamStreamCall[peer_pb2.FromReader, peer_pb2.FromOwner]

_OUTBOX_MESSAGES = 65_536
_ENDS: tuple[type[Exception], ...] = (*STREAM_ERRORS, TransferFailed, UnknownMessage)
_LEASE_INBOX_MESSAGES = 65_536


class BoundLease:
    """What arrives for one lease: announcements in order, then its end."""

    def __init__(self) -> None:
        self.announcements: Outbox[Announce] = Outbox(_LEASE_INBOX_MESSAGES)
        self.closed: asyncio.Future[LeaseOutcome] = asyncio.get_running_loop().create_future()
        self.failure: TransferFailed | None = None

    def fail(self, reason: str) -> None:
        """No more announcements come; the closing question stays unanswered."""
        self.failure = TransferFailed(reason)
        self.announcements.close()
        if not self.closed.done():
            self.closed.set_result(LeaseOutcome.ABORTED)


class PeerConnection:
    """`run` is its only task and ends with the stream."""

    def __init__(
        self, handoff: Handoff, hello: PeerHello, transport: Transport, renew_every_s: float
    ) -> None:
        self._address = handoff.owner_address
        self.owner: Incarnation = handoff.owner_incarnation
        self._hello = hello
        self._transport = transport
        self._renew_every_s = renew_every_s
        self._outbox: Outbox[FromReader] = Outbox(_OUTBOX_MESSAGES)
        self._leases: dict[LeaseId, BoundLease] = {}
        self._lost: TransferFailed | None = None
        self._heard = 0
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # -- used by the reader ---------------------------------------------------------------------

    @property
    def lost(self) -> bool:
        return self._lost is not None

    @asynccontextmanager
    async def bind(self, bind: Bind) -> AsyncIterator[BoundLease]:
        """Bound inside; on the way out the owner is told, unless the lease was closed."""
        if self._lost is not None:
            raise self._lost
        lease = self._leases[bind.lease_id] = BoundLease()
        self._outbox.send(bind)
        try:
            yield lease
        finally:
            del self._leases[bind.lease_id]
            if not lease.closed.done():
                self._outbox.send(Abort(lease_id=bind.lease_id, reason="the reader gave up"))

    async def close_lease(self, lease_id: LeaseId, timeout_s: float) -> LeaseOutcome:
        """Ask the closing question; silence is UNKNOWN."""
        lease = self._leases[lease_id]
        self._outbox.send(Close(lease_id=lease_id))
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of 3.11 can swallow a cancel
                return await asyncio.shield(lease.closed)
        except TimeoutError:
            return LeaseOutcome.UNKNOWN

    # -- the stream -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, say hello, serve until the stream ends; then every bound lease has failed."""
        reason = "the stream to the KV owner ended"
        try:
            async with grpc.aio.insecure_channel(self._address, options=CHANNEL_OPTIONS) as channel:
                stream = peer_pb2_grpc.PeerStub(channel).PeerStream()
                self._outbox.send(self._hello)
                await self._serve(stream)
        except* _ENDS as errors:
            reason = f"the stream to the KV owner broke: {describe_break(errors)}"
        finally:
            self._lose(TransferFailed(reason))
            await self._transport.disconnect(self.owner)
        heed_cancel()

    async def _serve(self, stream: Stream) -> None:
        async with asyncio.TaskGroup() as group:
            writer = group.create_task(self._write(stream))
            renewer = group.create_task(self._renew())
            overflow = group.create_task(self._end_overflow())
            await self._check_hello(await stream.read())
            self.ready.set_result(None)
            while isinstance(raw := await stream.read(), peer_pb2.FromOwner):
                self._heard += 1
                self._dispatch(raw)
            writer.cancel()
            renewer.cancel()
            overflow.cancel()

    async def _check_hello(self, raw: object) -> None:
        hello = from_owner_from_wire(raw) if isinstance(raw, peer_pb2.FromOwner) else None
        if not isinstance(hello, PeerHello):
            raise TransferFailed("the KV owner said no hello")
        if hello.protocol_major != PROTOCOL_MAJOR:
            raise TransferFailed(f"the KV owner speaks protocol {hello.protocol_major}")
        if hello.incarnation != self.owner:
            raise TransferFailed("the KV owner was restarted: its blocks are gone")
        if hello.model_id != self._hello.model_id:
            raise TransferFailed(f"the KV owner serves another model, {hello.model_id}")
        if hello.layout.layout_id != self._hello.layout.layout_id:
            raise TransferFailed("the KV owner has another layout and no reshard plan exists")
        await self._transport.connect(self.owner, hello.memory)

    def _dispatch(self, raw: peer_pb2.FromOwner) -> None:
        try:
            message = from_owner_from_wire(raw)
        except UnknownMessage as unknown:
            log.info("peer_message_skipped %s", unknown)
            return
        if isinstance(message, PeerHello | Renewed):
            return
        lease = self._leases.get(message.lease_id)
        if lease is None:
            return
        match message:
            case Announce():
                lease.announcements.send(message)
            case Closed():
                if not lease.closed.done():
                    lease.closed.set_result(message.outcome)
            case Abort():
                lease.fail(f"the KV owner ended the lease: {message.reason}")

    async def _write(self, stream: Stream) -> None:
        async for message in self._outbox:
            await stream.write(from_reader_to_wire(message))

    async def _end_overflow(self) -> None:
        """A writer stuck on an owner that does not read cannot end the stream itself."""
        await self._outbox.overflowed.wait()
        raise TransferFailed("the KV owner does not read its stream")

    async def _renew(self) -> None:
        """Keep the bound leases alive. The owner answers each renewal: silence is a lost owner."""
        while True:
            asked, heard = bool(self._leases), self._heard
            if asked:
                self._outbox.send(Renew(lease_ids=tuple(self._leases)))
            for _ in range(2):  # a pause of this process is not one of the owner
                await asyncio.sleep(self._renew_every_s / 2)
            if asked and heard == self._heard:
                raise TransferFailed(f"the KV owner said nothing for {self._renew_every_s:.1f} s")

    def _lose(self, failure: TransferFailed) -> None:
        self._lost = failure
        for lease in self._leases.values():
            lease.fail(str(failure))
        if not self.ready.done():
            self.ready.set_exception(failure)
            self.ready.exception()  # it may be that nobody waits for it
