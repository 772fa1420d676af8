"""The Registry as workers, routers and the command line see it: over gRPC, from anywhere.

A registry that is away delays news, and nothing else: `watch` reconnects for ever and repeats
nothing it has said.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self

import grpc

from cluster.registry_codec import record_to_wire, records_from_wire
from core.channel import CHANNEL_OPTIONS
from core.errors import Unavailable
from core.ids import Incarnation, WorkerId
from core.registry import WorkerRecord
from wire import registry_pb2, registry_pb2_grpc

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 3.0
_RECONNECT_S = (0.1, 0.2, 0.5, 1.0, 2.0)


class RegistryClient:
    """A Registry at `address`. Use it as an async context manager, or call `aclose` once.

    Calls other than `watch` raise Unavailable when the registry does not answer in time.
    """

    def __init__(self, address: str, call_timeout_s: float = _CALL_TIMEOUT_S) -> None:
        self._address = address
        self._timeout_s = call_timeout_s
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = registry_pb2_grpc.RegistryStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Drop the connection. End watches first: one in progress is cancelled."""
        await self._channel.close(grace=None)

    async def register(self, record: WorkerRecord, ttl_s: float) -> None:
        request = registry_pb2.RegisterRequest(record=record_to_wire(record), ttl_s=ttl_s)
        try:
            await self._stub.Register(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._unavailable(error) from error

    async def deregister(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        request = registry_pb2.DeregisterRequest(worker_id=worker_id, incarnation=incarnation)
        try:
            await self._stub.Deregister(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._unavailable(error) from error

    async def workers(self) -> tuple[WorkerRecord, ...]:
        request = registry_pb2.ListWorkersRequest()
        try:
            reply = await self._stub.ListWorkers(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._unavailable(error) from error
        return records_from_wire(reply)

    async def watch(self) -> AsyncGenerator[tuple[WorkerRecord, ...], None]:
        last: tuple[WorkerRecord, ...] | None = None
        failures = 0
        while True:
            stream = self._stub.WatchWorkers(registry_pb2.WatchWorkersRequest())
            try:
                async for message in stream:
                    failures = 0
                    records = records_from_wire(message)
                    if records != last:
                        last = records
                        yield records
                detail = "the stream ended"
            except grpc.aio.AioRpcError as error:
                detail = str(error.details())
            finally:
                stream.cancel()
            if failures == 0:
                log.warning("registry_lost address=%s reason=%r", self._address, detail)
            await asyncio.sleep(_RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)])
            failures += 1

    def _unavailable(self, error: grpc.aio.AioRpcError) -> Unavailable:
        return Unavailable(
            f"the registry at {self._address} does not answer: {error.code().name.lower()},"
            f" {error.details()}"
        )
