"""The worker's gRPC door: RouterStream, and the control calls of `baton status` and drains."""

import asyncio
import logging
import os

import grpc

from cluster.worker.outlet import RouterOutlet
from cluster.worker.worker import Worker
from core.clock import Clock
from core.ids import WorkerId
from core.messages import PROTOCOL_MAJOR
from kv_transfer.codec import UnknownMessage, sequence_id_to_wire
from kv_transfer.leases import NEVER_S, Lease
from kv_transfer.metrics import PairMetrics
from prefill_worker.prefix import FetchCounters
from router.codec import from_router, hello_to_wire, load_to_wire, to_router
from wire import worker_pb2, worker_pb2_grpc

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[object, object]

_HELLO_TIMEOUT_S = 5.0


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Translates; all decisions are the Worker's."""

    def __init__(self, worker: Worker, clock: Clock) -> None:
        self._worker = worker
        self._clock = clock

    async def RouterStream(self, _requests: object, context: Context) -> None:  # noqa: N802
        await self._check_hello(context)
        outlet = self._worker.attach()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._write(outlet, context))
                watch = group.create_task(_end_overflow(outlet, context))
                await self._read(outlet, context)
                outlet.outbox.close()
                watch.cancel()
        finally:
            self._worker.detach(outlet)

    async def _check_hello(self, context: Context) -> None:
        async with asyncio.timeout(_HELLO_TIMEOUT_S):
            raw = await context.read()
        if not isinstance(raw, worker_pb2.ToWorker) or not raw.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a hello must come first")
        elif raw.hello.protocol.major != PROTOCOL_MAJOR:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"router protocol {raw.hello.protocol.major}, worker protocol {PROTOCOL_MAJOR}",
            )

    async def _read(self, outlet: RouterOutlet, context: Context) -> None:
        while isinstance(raw := await context.read(), worker_pb2.ToWorker):
            try:
                message = from_router(raw)
            except UnknownMessage as unknown:
                log.info("router_message_skipped %s", unknown)
                continue
            self._worker.handle(outlet, message)

    async def _write(self, outlet: RouterOutlet, context: Context) -> None:
        async for message in outlet.outbox:
            await context.write(to_router(message))

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, _context: Context
    ) -> worker_pb2.DrainReply:
        left = await self._worker.drain(request.timeout_s)
        return worker_pb2.DrainReply(drained=left == 0, legs_left=left)

    async def Stats(  # noqa: N802
        self, _request: worker_pb2.StatsRequest, _context: Context
    ) -> worker_pb2.StatsReply:
        worker = self._worker
        counts, problem = worker.pool_counts()
        leases = worker.leases.counters
        return worker_pb2.StatsReply(
            who=hello_to_wire(worker.hello()),
            load=load_to_wire(worker.load()),
            blocks_free=counts.free,
            blocks_cached=counts.cached,
            blocks_in_use=counts.in_use,
            blocks_receiving=counts.receiving,
            blocks_quarantined=counts.quarantined,
            blocks_held=counts.held,
            pool_error=problem,
            leases=[self._lease(lease) for lease in worker.leases.all()],
            leases_opened=leases.opened,
            leases_closed=leases.closed,
            leases_aborted=leases.aborted,
            leases_expired=leases.expired,
            pid=os.getpid(),
            open_legs=worker.open_legs,
            transports=worker.transports.names,
            peers=[
                _peer_to_wire(owner_id, pair)
                for owner_id, pair in worker.reader.metrics.pairs.items()
            ],
            preemptions=worker.runner.preemptions,
            prefix_fetches=_fetches_to_wire(worker.prefill.fetches),
        )

    def _lease(self, lease: Lease) -> worker_pb2.Lease:
        now_s = self._clock.now_s()
        expires_in_s = -1.0 if lease.expires_at_s == NEVER_S else lease.expires_at_s - now_s
        return worker_pb2.Lease(
            lease_id=lease.lease_id,
            sequence_id=sequence_id_to_wire(lease.sequence_id),
            reader=lease.reader or "",
            blocks=len(lease.blocks),
            age_s=now_s - lease.opened_at_s,
            expires_in_s=expires_in_s,
        )


def _peer_to_wire(owner_id: WorkerId, pair: PairMetrics) -> worker_pb2.PeerTransfers:
    return worker_pb2.PeerTransfers(
        owner_id=owner_id,
        transport=pair.transport,
        handoffs=pair.handoffs,
        reads=pair.reads,
        nbytes=pair.nbytes,
        blocks=pair.blocks,
        descriptors=pair.descriptors,
        seconds=pair.seconds,
        hidden_s=pair.hidden_s,
        failures=pair.failures,
    )


def _fetches_to_wire(counters: FetchCounters) -> worker_pb2.PrefixFetches:
    return worker_pb2.PrefixFetches(
        tried=counters.tried,
        won=counters.won,
        tokens=counters.tokens,
        shared=counters.shared,
        failed=counters.failed,
        skipped=counters.skipped,
    )


async def _end_overflow(outlet: RouterOutlet, context: Context) -> None:
    """A writer stuck on a router that does not read cannot end the stream itself."""
    await outlet.outbox.overflowed.wait()
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the router fell behind")


def add_worker_service(server: grpc.aio.Server, worker: Worker, clock: Clock) -> None:
    """Serve the Worker service on `server`."""
    worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(worker, clock), server)
