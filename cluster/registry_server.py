"""Serves any Registry over gRPC. The controller runs one around a MemoryRegistry, on a socket in
the run's folder, where only the user can reach it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from cluster.registry_codec import UnknownRole, record_from_wire, records_to_wire
from core.channel import SERVER_OPTIONS
from core.errors import InternalError
from core.ids import Incarnation, WorkerId
from core.registry import MAX_TTL_S, Registry
from wire import registry_pb2, registry_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]

_STOP_GRACE_S = 0.5


@asynccontextmanager
async def serve_registry(registry: Registry, address: str) -> AsyncIterator[str]:
    """Serve inside the block on `host:port` or `unix:path`; port 0 takes a free one.

    Gives the address for clients. Watches end with the block; clients reconnect by themselves.
    """
    closing = asyncio.Event()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    registry_pb2_grpc.add_RegistryServicer_to_server(_Servicer(registry, closing), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise InternalError(f"the registry cannot listen on {address}") from error
    await server.start()
    try:
        yield address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    finally:
        closing.set()
        await server.stop(_STOP_GRACE_S)


class _Servicer(registry_pb2_grpc.RegistryServicer):
    def __init__(self, registry: Registry, closing: asyncio.Event) -> None:
        self._registry = registry
        self._closing = closing

    async def Register(  # noqa: N802
        self, request: registry_pb2.RegisterRequest, context: Context
    ) -> registry_pb2.RegisterReply:
        if not 0 < request.ttl_s <= MAX_TTL_S:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"ttl_s must be in (0, {MAX_TTL_S:g}]"
            )
        try:
            record = record_from_wire(request.record)
        except UnknownRole as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        await self._registry.register(record, request.ttl_s)
        return registry_pb2.RegisterReply()

    async def Deregister(  # noqa: N802
        self, request: registry_pb2.DeregisterRequest, context: Context
    ) -> registry_pb2.DeregisterReply:
        await self._registry.deregister(
            WorkerId(request.worker_id), Incarnation(request.incarnation)
        )
        return registry_pb2.DeregisterReply()

    async def ListWorkers(  # noqa: N802
        self, request: registry_pb2.ListWorkersRequest, context: Context
    ) -> registry_pb2.WorkerRecords:
        return records_to_wire(await self._registry.workers())

    async def WatchWorkers(  # noqa: N802
        self, request: registry_pb2.WatchWorkersRequest, context: Context
    ) -> AsyncIterator[registry_pb2.WorkerRecords]:
        watch = self._registry.watch()
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            while True:
                records = asyncio.ensure_future(anext(watch))
                try:
                    await asyncio.wait({records, closing}, return_when=asyncio.FIRST_COMPLETED)
                    if not records.done():
                        return
                    yield records_to_wire(records.result())
                finally:
                    await _end(records)
        finally:
            await _end(closing)


async def _end(task: "asyncio.Future[Any]") -> None:
    task.cancel()
    await asyncio.wait([task])
