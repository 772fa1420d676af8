"""The worker's gRPC door: the control calls of `baton status` and drains."""

import os

import grpc

from cluster.worker.worker import Worker
from core.clock import Clock
from core.ids import WorkerId
from kv_transfer.codec import sequence_id_to_wire
from kv_transfer.leases import NEVER_S, Lease
from kv_transfer.metrics import LeaseEnd, PairMetrics
from prefill_worker.prefix import FetchCounters
from router.codec import hello_to_wire, load_to_wire
from wire import worker_pb2, worker_pb2_grpc

Context = grpc.aio.ServicerContext[object, object]


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Translates; all decisions are the Worker's."""

    def __init__(self, worker: Worker, clock: Clock, metrics_address: str) -> None:
        self._worker = worker
        self._clock = clock
        self._metrics_address = metrics_address

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
            leases_closed=leases.ended[LeaseEnd.CLOSED],
            leases_aborted=leases.ended[LeaseEnd.ABORTED],
            leases_expired=leases.ended[LeaseEnd.EXPIRED],
            leases_withdrawn=leases.ended[LeaseEnd.WITHDRAWN],
            readers=[
                worker_pb2.ReaderLeases(
                    reader_id=reader_id, ended={how.value: count for how, count in ended.items()}
                )
                for reader_id, ended in leases.by_reader.items()
            ],
            pid=os.getpid(),
            open_legs=worker.open_legs,
            transports=worker.transports.names,
            peers=[
                _peer_to_wire(owner_id, pair)
                for owner_id, pair in worker.reader.metrics.pairs.items()
            ],
            preemptions=worker.runner.preemptions,
            prefix_fetches=_fetches_to_wire(worker.prefill.fetches),
            metrics_address=self._metrics_address,
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
        sealed=pair.sealed,
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


def add_worker_service(
    server: grpc.aio.Server, worker: Worker, clock: Clock, metrics_address: str
) -> None:
    """Serve the Worker service on `server`; `metrics_address` is told to who asks."""
    service = WorkerService(worker, clock, metrics_address)
    worker_pb2_grpc.add_WorkerServicer_to_server(service, server)
