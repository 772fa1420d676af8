"""The worker's end of a RouterStream: one per router."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.worker.outlet import RouterOutlet
from cluster.worker.worker import Worker
from core.channel import describe_break, heed_cancel
from core.messages import PROTOCOL_MAJOR, RouterRefused
from kv_transfer.codec import UnknownMessage
from kv_transfer.stream import MessageStream, StreamBroken, accepting
from router.codec import from_router, parse_to_worker, to_router
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
        except* (NotServed, StreamBroken, UnknownMessage, TimeoutError) as errors:
            log.info("router_stream_ended reason=%s", describe_break(errors))
        except* Exception:  # the root of a stream's task
            log.exception("router_stream_bug")
        heed_cancel()

    async def _serve(self, stream: Stream) -> None:
        await _admit(stream)
        outlet = self._worker.attach(lambda message: stream.send(to_router(message)))
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
            self._worker.handle(outlet, message)


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
    stream.close()
    raise NotServed(reason)


@asynccontextmanager
async def serving_routers(listener: socket.socket, worker: Worker) -> AsyncIterator[None]:
    """Serve RouterStreams inside; closes `listener`."""
    async with accepting(listener, parse_to_worker, RouterDoor(worker).serve):
        yield
