"""WorkerControl over gRPC: the worker's Stats call."""

import grpc

from cluster.registry_codec import UnknownRole, role_from_wire
from cluster.status import BlockCounts, LeaseStatus, PeerStatus, ReaderStatus, WorkerStats
from core.channel import CHANNEL_OPTIONS
from core.errors import Unavailable
from kv_transfer.codec import sequence_id_from_wire
from wire import common_pb2, worker_pb2, worker_pb2_grpc


class GrpcWorkerControl:
    """One short connection per call: control is rare and off the request path."""

    async def stats(self, address: str, timeout_s: float) -> WorkerStats:
        async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            try:
                reply = await stub.Stats(worker_pb2.StatsRequest(), timeout=timeout_s)
            except grpc.aio.AioRpcError as error:
                raise _unavailable(address, error, timeout_s) from error
        return _stats(reply)


def _stats(reply: worker_pb2.StatsReply) -> WorkerStats:
    return WorkerStats(
        role=_role(reply.who.role),
        incarnation=reply.who.incarnation,
        pid=reply.pid,
        draining=reply.load.draining,
        waiting=reply.load.waiting,
        running=reply.load.running,
        queued_tokens=reply.load.queued_tokens,
        context_tokens=reply.load.context_tokens,
        blocks=BlockCounts(
            free=reply.blocks_free,
            cached=reply.blocks_cached,
            in_use=reply.blocks_in_use,
            receiving=reply.blocks_receiving,
            quarantined=reply.blocks_quarantined,
            held=reply.blocks_held,
        ),
        pool_error=reply.pool_error,
        leases=tuple(_lease(lease) for lease in reply.leases),
        leases_opened=reply.leases_opened,
        leases_closed=reply.leases_closed,
        leases_aborted=reply.leases_aborted,
        leases_expired=reply.leases_expired,
        leases_withdrawn=reply.leases_withdrawn,
        readers=tuple(
            ReaderStatus(reader_id=reader.reader_id, leases=dict(reader.ended))
            for reader in reply.readers
        ),
        transports=tuple(reply.transports),
        transfer_bytes=sum(peer.nbytes for peer in reply.peers),
        transfer_blocks=sum(peer.blocks for peer in reply.peers),
        transfer_failures=sum(sum(peer.failures.values()) for peer in reply.peers),
        peers=tuple(_peer(peer) for peer in reply.peers),
        preemptions=reply.preemptions,
        metrics_address=reply.metrics_address,
    )


def _peer(peer: worker_pb2.PeerTransfers) -> PeerStatus:
    return PeerStatus(
        owner_id=peer.owner_id,
        transport=peer.transport,
        handoffs=peer.handoffs,
        reads=peer.reads,
        nbytes=peer.nbytes,
        blocks=peer.blocks,
        descriptors=peer.descriptors,
        seconds=peer.seconds,
        hidden_s=peer.hidden_s,
        sealed=peer.sealed,
        failures=dict(peer.failures),
    )


def _lease(lease: worker_pb2.Lease) -> LeaseStatus:
    return LeaseStatus(
        lease_id=lease.lease_id,
        sequence_id=str(sequence_id_from_wire(lease.sequence_id)),
        reader=lease.reader,
        blocks=lease.blocks,
        age_s=lease.age_s,
        expires_in_s=None if lease.expires_in_s < 0 else lease.expires_in_s,
    )


def _role(role: common_pb2.Role) -> str:
    try:
        return str(role_from_wire(role))
    except UnknownRole:
        return "unknown"


def _unavailable(address: str, error: grpc.aio.AioRpcError, timeout_s: float) -> Unavailable:
    code = error.code()
    reasons = {
        grpc.StatusCode.DEADLINE_EXCEEDED: f"nothing came within {timeout_s:g} s",
        grpc.StatusCode.UNAVAILABLE: "no connection",
    }
    reason = reasons.get(code, code.name.lower())
    return Unavailable(f"the worker at {address} does not answer: {reason}")
