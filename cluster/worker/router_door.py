"""The worker's end of a RouterStream: one per router."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.worker.outlet import RouterOutlet
from cluster.worker.worker import Worker
from core.channel import describe_break, heed_cancel
from core.errors import RequestTooLarge
from core.messages import (
    PROTOCOL_MAJOR,
    Accepted,
    KvEvents,
    LegFailed,
    Moved,
    Offered,
    Rejected,
    RenewLeases,
    RouterRefused,
    SnapshotRequest,
    TokenFrame,
    Withdrawn,
    WorkerToRouter,
)
from core.stream import MessageStream, StreamBroken, accepting
from kv_transfer.codec import UnknownMessage
from router.codec import from_router, to_router
from wire import worker_pb2

log = logging.getLogger(__name__)

Stream = MessageStream[worker_pb2.ToWorker]

_HELLO_TIMEOUT_S = 5.0


class NotServed(Exception):
    """The router is refused; it is told why."""


class RouterDoor:
    """Translates; all decisions are the Worker's."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def serve(self, stream: Stream) -> None:
        """One stream to its end; raises nothing."""
        try:
            await self._serve(stream)
        except* (NotServed, StreamBroken, TimeoutError) as errors:
            reason = describe_break(errors)
            log.info("router_stream_ended from=%s reason=%r", stream.other_end, reason)
        except* Exception:  # the root of a stream's task
            log.exception("router_stream_bug from=%s", stream.other_end)
        heed_cancel()

    async def _serve(self, stream: Stream) -> None:
        await _admit(stream)
        voice = Voice(stream, self._worker)
        outlet = voice.outlet = self._worker.attach(voice.say)
        try:
            await self._read(outlet, stream)
        finally:
            self._worker.detach(outlet)

    async def _read(self, outlet: RouterOutlet, stream: Stream) -> None:
        while (raw := await stream.read()) is not None:
            try:
                message = from_router(raw)
            except UnknownMessage as unknown:
                log.info("router_message_skipped %s", unknown)
                continue
            try:
                self._worker.handle(outlet, message)
            except Exception as bug:
                # What is about one leg must not end the stream, and with it all the others.
                if isinstance(message, RenewLeases | SnapshotRequest):
                    raise
                self._worker.handled_badly(outlet, message, bug)


class Voice:
    """Says to one router what its stream can carry: other messages are divided, and what cannot be
    divided ends the leg it is about. A message that is too large would end the stream, and with it
    every leg of that router.
    """

    def __init__(self, stream: Stream, worker: Worker) -> None:
        self._stream = stream
        self._worker = worker
        self.outlet: RouterOutlet | None = None
        """Whose voice it is, once that is attached."""

    def say(self, message: WorkerToRouter) -> None:
        """On its way, or dropped when the stream has ended; never waits."""
        encoded = to_router(message)
        if self._stream.try_send(encoded):
            return
        match message:
            case TokenFrame(entries=entries) if len(entries) > 1:
                middle = len(entries) // 2
                self.say(TokenFrame(entries=entries[:middle]))
                self.say(TokenFrame(entries=entries[middle:]))
            case TokenFrame(entries=(entry,)):
                self._fail(entry.number, encoded.ByteSize())
            case KvEvents(first_number=first, events=events) if len(events) > 1:
                middle = len(events) // 2
                self.say(KvEvents(first_number=first, events=events[:middle]))
                self.say(KvEvents(first_number=first + middle, events=events[middle:]))
            case KvEvents():  # the gap in the numbers makes the router ask for a snapshot
                log.warning("kv_event_too_large bytes=%d", encoded.ByteSize())
            case Accepted() | Rejected() | LegFailed() | Offered() | Moved() | Withdrawn():
                self._fail(message.number, encoded.ByteSize())
            case _:
                self._stream.send(encoded)  # which ends the stream: it is about all its legs

    def _fail(self, number: int, size_bytes: int) -> None:
        log.warning("router_message_too_large number=%d bytes=%d", number, size_bytes)
        if self.outlet is not None:
            why = f"the worker's message of {size_bytes} bytes is too large for its stream"
            self._worker.fail_leg(self.outlet, number, RequestTooLarge(why))


async def _admit(stream: Stream) -> None:
    """Take the router's hello. Raises NotServed, after telling it."""
    async with asyncio.timeout(_HELLO_TIMEOUT_S):
        raw = await stream.read()
    if raw is None or not raw.HasField("hello"):
        reason = "a hello must come first"
    elif raw.hello.protocol.major != PROTOCOL_MAJOR:
        reason = f"router protocol {raw.hello.protocol.major}, worker protocol {PROTOCOL_MAJOR}"
    else:
        return
    stream.send(to_router(RouterRefused(reason=reason)))
    raise NotServed(reason)


@asynccontextmanager
async def serving_routers(listener: socket.socket, worker: Worker) -> AsyncIterator[None]:
    """Serve RouterStreams inside; closes `listener`."""
    async with accepting(listener, worker_pb2.ToWorker.FromString, RouterDoor(worker).serve):
        yield
