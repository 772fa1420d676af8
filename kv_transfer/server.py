"""The gRPC door of the owner's side: one PeerStream per reader."""

import asyncio
import logging
from collections.abc import Callable

import grpc

from core.messages import PROTOCOL_MAJOR
from core.outbox import Outbox
from engine.arena import Arena
from kv_transfer.checksum import checksum_blocks
from kv_transfer.codec import UnknownMessage, from_owner_to_wire, from_reader_from_wire
from kv_transfer.messages import Close, FromOwner, FromReader, PeerHello
from kv_transfer.owner import Owner
from wire import peer_pb2, peer_pb2_grpc

log = logging.getLogger(__name__)

_OUTBOX_MESSAGES = 65_536
_HELLO_TIMEOUT_S = 5.0

Context = grpc.aio.ServicerContext[object, object]


class PeerService(peer_pb2_grpc.PeerServicer):
    """Translates; all decisions are the Owner's. `hello` is asked for each stream: the transports'
    metadata may have changed.
    """

    def __init__(self, owner: Owner, hello: Callable[[], PeerHello], arena: Arena) -> None:
        self._owner = owner
        self._hello = hello
        self._arena = arena

    async def PeerStream(self, _requests: object, context: Context) -> None:  # noqa: N802
        mine = self._hello()
        hello = await self._read_hello(mine, context)
        outbox: Outbox[FromOwner] = Outbox(_OUTBOX_MESSAGES)
        outbox.send(mine)
        reader = self._owner.attach(hello, outbox.send)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(outbox, context))
                watch = group.create_task(_end_overflow(outbox, context))
                await self._read(reader, context)
                outbox.close()
                watch.cancel()
        finally:
            self._owner.detach(reader)

    async def _read_hello(self, mine: PeerHello, context: Context) -> PeerHello:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            raw = await context.read()
        try:
            hello = from_reader_from_wire(raw) if isinstance(raw, peer_pb2.FromReader) else None
        except UnknownMessage as unknown:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(unknown))
        if not isinstance(hello, PeerHello):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a hello must come first")
        if hello.protocol_major != PROTOCOL_MAJOR:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"protocol {hello.protocol_major} speaks to protocol {PROTOCOL_MAJOR}",
            )
        if hello.model_id != mine.model_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"reader's model {hello.model_id} is not this owner's {mine.model_id}",
            )
        return hello

    async def _read(self, reader: str, context: Context) -> None:
        while isinstance(raw := await context.read(), peer_pb2.FromReader):
            try:
                message = from_reader_from_wire(raw)
            except UnknownMessage as unknown:
                log.info("peer_message_skipped %s", unknown)
                continue
            await self._handle(reader, message)

    async def _handle(self, reader: str, message: FromReader) -> None:
        """A question with checksums waits for them; the blocks stay leased meanwhile."""
        if (
            isinstance(message, Close)
            and message.verify
            and self._owner.may_verify(reader, message)
        ):
            checksums = await checksum_blocks(self._arena, message.verify)
            self._owner.close(reader, message, checksums)
        else:
            self._owner.handle(reader, message)

    async def _write(self, outbox: Outbox[FromOwner], context: Context) -> None:
        async for message in outbox:
            await context.write(from_owner_to_wire(message))


async def _end_overflow(outbox: Outbox[FromOwner], context: Context) -> None:
    """A writer stuck on a reader that does not read cannot end the stream itself."""
    await outbox.overflowed.wait()
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the reader fell behind")


def add_peer_service(
    server: grpc.aio.Server, owner: Owner, hello: Callable[[], PeerHello], arena: Arena
) -> None:
    """Serve PeerStream on `server`."""
    peer_pb2_grpc.add_PeerServicer_to_server(PeerService(owner, hello, arena), server)
