"""Typed values to and from the wire: what all services share, and the PeerStream's messages."""

from typing import cast

from core.ids import BlockId, Incarnation, LeaseId, ModelId, RequestId, SequenceId, WorkerId
from core.kv import DTYPE_BYTES, KvLayout
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    FromOwner,
    FromReader,
    LeaseOutcome,
    Memory,
    PeerHello,
    Renew,
    Renewed,
)
from wire import common_pb2, peer_pb2


class UnknownMessage(ValueError):
    """A message kind of a newer peer; the receiver skips it."""


def layout_to_wire(layout: KvLayout) -> common_pb2.KvLayout:
    return common_pb2.KvLayout(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        num_layers=layout.num_layers,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        tp_size=layout.tp_size,
        tp_rank=layout.tp_rank,
    )


def layout_from_wire(layout: common_pb2.KvLayout) -> KvLayout:
    if layout.dtype not in DTYPE_BYTES:
        raise UnknownMessage(f"KV dtype {layout.dtype!r}")
    return KvLayout(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        num_layers=layout.num_layers,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        tp_size=layout.tp_size or 1,
        tp_rank=layout.tp_rank,
    )


def sequence_id_to_wire(sequence_id: SequenceId) -> common_pb2.SequenceId:
    return common_pb2.SequenceId(
        request_id=sequence_id.request_id, choice=sequence_id.choice, attempt=sequence_id.attempt
    )


def sequence_id_from_wire(sequence_id: common_pb2.SequenceId) -> SequenceId:
    return SequenceId(RequestId(sequence_id.request_id), sequence_id.choice, sequence_id.attempt)


def from_reader_to_wire(message: FromReader) -> peer_pb2.FromReader:
    match message:
        case PeerHello():
            return peer_pb2.FromReader(hello=_hello_to_wire(message))
        case Bind():
            return peer_pb2.FromReader(
                bind=peer_pb2.Bind(
                    lease_id=message.lease_id,
                    sequence_id=sequence_id_to_wire(message.sequence_id),
                    first_block=message.first_block,
                )
            )
        case Renew():
            return peer_pb2.FromReader(renew=peer_pb2.Renew(lease_ids=message.lease_ids))
        case Close():
            return peer_pb2.FromReader(close=peer_pb2.Close(lease_id=message.lease_id))
        case Abort():
            return peer_pb2.FromReader(abort=_abort_to_wire(message))


def from_reader_from_wire(message: peer_pb2.FromReader) -> FromReader:
    match message.WhichOneof("message"):
        case "hello":
            return _hello_from_wire(message.hello)
        case "bind":
            return Bind(
                lease_id=LeaseId(message.bind.lease_id),
                sequence_id=sequence_id_from_wire(message.bind.sequence_id),
                first_block=message.bind.first_block,
            )
        case "renew":
            return Renew(lease_ids=tuple(LeaseId(i) for i in message.renew.lease_ids))
        case "close":
            return Close(lease_id=LeaseId(message.close.lease_id))
        case "abort":
            return _abort_from_wire(message.abort)
        case other:
            raise UnknownMessage(f"from a reader: {other}")


def from_owner_to_wire(message: FromOwner) -> peer_pb2.FromOwner:
    match message:
        case PeerHello():
            return peer_pb2.FromOwner(hello=_hello_to_wire(message))
        case Announce():
            return peer_pb2.FromOwner(
                announce=peer_pb2.Announce(
                    lease_id=message.lease_id,
                    sequence_id=sequence_id_to_wire(message.sequence_id),
                    first_index=message.first_index,
                    block_ids=message.block_ids,
                    final=message.final,
                    first_token=message.first_token,
                    ended=message.ended,
                )
            )
        case Renewed():
            return peer_pb2.FromOwner(renewed=peer_pb2.Renewed())
        case Closed():
            return peer_pb2.FromOwner(
                closed=peer_pb2.Closed(
                    lease_id=message.lease_id,
                    outcome=cast(peer_pb2.Outcome, int(message.outcome)),
                )
            )
        case Abort():
            return peer_pb2.FromOwner(abort=_abort_to_wire(message))


def from_owner_from_wire(message: peer_pb2.FromOwner) -> FromOwner:
    match message.WhichOneof("message"):
        case "hello":
            return _hello_from_wire(message.hello)
        case "announce":
            announce = message.announce
            return Announce(
                lease_id=LeaseId(announce.lease_id),
                sequence_id=sequence_id_from_wire(announce.sequence_id),
                first_index=announce.first_index,
                block_ids=tuple(BlockId(i) for i in announce.block_ids),
                final=announce.final,
                first_token=announce.first_token,
                ended=announce.ended,
            )
        case "renewed":
            return Renewed()
        case "closed":
            known = {outcome.value for outcome in LeaseOutcome}
            outcome = message.closed.outcome if message.closed.outcome in known else 0
            return Closed(lease_id=LeaseId(message.closed.lease_id), outcome=LeaseOutcome(outcome))
        case "abort":
            return _abort_from_wire(message.abort)
        case other:
            raise UnknownMessage(f"from an owner: {other}")


def _hello_to_wire(hello: PeerHello) -> peer_pb2.PeerHello:
    return peer_pb2.PeerHello(
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        model_id=hello.model_id,
        layout=layout_to_wire(hello.layout),
        protocol=common_pb2.Protocol(major=hello.protocol_major, minor=hello.protocol_minor),
        memory=peer_pb2.Memory(
            transport=hello.memory.transport,
            metadata=hello.memory.metadata,
            address=hello.memory.address,
            nbytes=hello.memory.nbytes,
            device=hello.memory.device,
        ),
    )


def _hello_from_wire(hello: peer_pb2.PeerHello) -> PeerHello:
    return PeerHello(
        worker_id=WorkerId(hello.worker_id),
        incarnation=Incarnation(hello.incarnation),
        model_id=ModelId(hello.model_id),
        layout=layout_from_wire(hello.layout),
        memory=Memory(
            transport=hello.memory.transport,
            metadata=hello.memory.metadata,
            address=hello.memory.address,
            nbytes=hello.memory.nbytes,
            device=hello.memory.device,
        ),
        protocol_major=hello.protocol.major,
        protocol_minor=hello.protocol.minor,
    )


def _abort_to_wire(abort: Abort) -> peer_pb2.Abort:
    return peer_pb2.Abort(lease_id=abort.lease_id, reason=abort.reason)


def _abort_from_wire(abort: peer_pb2.Abort) -> Abort:
    return Abort(lease_id=LeaseId(abort.lease_id), reason=abort.reason)
