"""Typed values to and from the wire: what all services share, and the PeerStream's messages."""

from collections.abc import Iterable
from typing import cast, get_args

from core.blocks import HASH_BYTES
from core.ids import (
    BlockHash,
    BlockId,
    Incarnation,
    LeaseId,
    ModelId,
    RequestId,
    SequenceId,
    WorkerId,
)
from core.kv import BLOCK_FIRST, DTYPE_BYTES, Axis, KvLayout
from kv_transfer.messages import (
    Abort,
    Announce,
    Bind,
    Close,
    Closed,
    Fetch,
    Fetched,
    FromOwner,
    FromReader,
    LeaseOutcome,
    Memory,
    PeerHello,
    Ready,
    Refused,
    Renew,
    Renewed,
    Seal,
    Shard,
)
from wire import common_pb2, peer_pb2

_OUTCOMES = {outcome.value: outcome for outcome in LeaseOutcome}


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
        total_kv_heads=layout.total_kv_heads,
        sides=layout.sides,
        axes=",".join(layout.axes),
    )


def layout_from_wire(layout: common_pb2.KvLayout) -> KvLayout:
    if layout.dtype not in DTYPE_BYTES:
        raise UnknownMessage(f"KV dtype {layout.dtype!r}")
    axes = tuple(layout.axes.split(",")) if layout.axes else BLOCK_FIRST
    if sorted(axes) != sorted(get_args(Axis)):
        raise UnknownMessage(f"KV axes {layout.axes!r}")
    return KvLayout(
        block_size=layout.block_size,
        num_kv_heads=layout.num_kv_heads,
        num_layers=layout.num_layers,
        head_dim=layout.head_dim,
        dtype=layout.dtype,
        tp_size=layout.tp_size or 1,
        tp_rank=layout.tp_rank,
        total_kv_heads=layout.total_kv_heads,
        sides=layout.sides or 2,
        axes=cast(tuple[Axis, ...], axes),
    )


def hashes_from_wire(data: bytes) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(data[i : i + HASH_BYTES]) for i in range(0, len(data), HASH_BYTES))


def _block_ids(numbers: Iterable[int]) -> tuple[BlockId, ...]:
    """Ids cost nothing at run time but the calls that would make each of them one."""
    return cast(tuple[BlockId, ...], tuple(numbers))


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
                    first_index=message.first_index,
                )
            )
        case Fetch():
            return peer_pb2.FromReader(
                fetch=peer_pb2.Fetch(
                    number=message.number,
                    sequence_id=sequence_id_to_wire(message.sequence_id),
                    hashes=b"".join(message.hashes),
                    first_index=message.first_index,
                )
            )
        case Ready():
            return peer_pb2.FromReader(ready=peer_pb2.Ready(lease_id=message.lease_id))
        case Renew():
            return peer_pb2.FromReader(renew=peer_pb2.Renew(lease_ids=message.lease_ids))
        case Close():
            return peer_pb2.FromReader(
                close=peer_pb2.Close(lease_id=message.lease_id, verify=message.verify)
            )
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
                first_index=message.bind.first_index,
            )
        case "fetch":
            return Fetch(
                number=message.fetch.number,
                sequence_id=sequence_id_from_wire(message.fetch.sequence_id),
                hashes=hashes_from_wire(message.fetch.hashes),
                first_index=message.fetch.first_index,
            )
        case "ready":
            return Ready(lease_id=LeaseId(message.ready.lease_id))
        case "renew":
            return Renew(lease_ids=tuple(LeaseId(i) for i in message.renew.lease_ids))
        case "close":
            return Close(
                lease_id=LeaseId(message.close.lease_id),
                verify=_block_ids(message.close.verify),
            )
        case "abort":
            return _abort_from_wire(message.abort)
        case other:
            raise UnknownMessage(f"from a reader: {other}")


def from_owner_to_wire(message: FromOwner) -> peer_pb2.FromOwner:
    match message:
        case PeerHello():
            return peer_pb2.FromOwner(hello=_hello_to_wire(message))
        case Refused():
            return peer_pb2.FromOwner(refused=peer_pb2.Refused(reason=message.reason))
        case Announce():
            return peer_pb2.FromOwner(
                announce=peer_pb2.Announce(
                    lease_id=message.lease_id,
                    sequence_id=sequence_id_to_wire(message.sequence_id),
                    first_index=message.first_index,
                    block_ids=message.block_ids,
                    final=message.final,
                    tokens=message.tokens,
                    ended=message.ended,
                    seal=_seal_to_wire(message.seal),
                )
            )
        case Fetched():
            return peer_pb2.FromOwner(
                fetched=peer_pb2.Fetched(
                    number=message.number,
                    lease_id=message.lease_id,
                    block_ids=message.block_ids,
                    seal=_seal_to_wire(message.seal),
                )
            )
        case Renewed():
            return peer_pb2.FromOwner(renewed=peer_pb2.Renewed())
        case Closed():
            return peer_pb2.FromOwner(
                closed=peer_pb2.Closed(
                    lease_id=message.lease_id,
                    outcome=_outcome_to_wire(message.outcome),
                    checksums=message.checksums,
                )
            )
        case Abort():
            return peer_pb2.FromOwner(abort=_abort_to_wire(message))


def from_owner_from_wire(message: peer_pb2.FromOwner) -> FromOwner:
    match message.WhichOneof("message"):
        case "hello":
            return _hello_from_wire(message.hello)
        case "refused":
            return Refused(reason=message.refused.reason)
        case "announce":
            announce = message.announce
            return Announce(
                lease_id=LeaseId(announce.lease_id),
                sequence_id=sequence_id_from_wire(announce.sequence_id),
                first_index=announce.first_index,
                block_ids=_block_ids(announce.block_ids),
                final=announce.final,
                tokens=tuple(announce.tokens),
                ended=announce.ended,
                seal=_seal_from_wire(announce.seal),
            )
        case "fetched":
            return Fetched(
                number=message.fetched.number,
                lease_id=LeaseId(message.fetched.lease_id),
                block_ids=_block_ids(message.fetched.block_ids),
                seal=_seal_from_wire(message.fetched.seal),
            )
        case "renewed":
            return Renewed()
        case "closed":
            return Closed(
                lease_id=LeaseId(message.closed.lease_id),
                outcome=_outcome_from_wire(message.closed.outcome),
                checksums=tuple(message.closed.checksums),
            )
        case "abort":
            return _abort_from_wire(message.abort)
        case other:
            raise UnknownMessage(f"from an owner: {other}")


def _hello_to_wire(hello: PeerHello) -> peer_pb2.PeerHello:
    return peer_pb2.PeerHello(
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        model_id=hello.model_id,
        protocol=common_pb2.Protocol(major=hello.protocol_major, minor=hello.protocol_minor),
        shards=[_shard_to_wire(shard) for shard in hello.shards],
    )


def _hello_from_wire(hello: peer_pb2.PeerHello) -> PeerHello:
    return PeerHello(
        worker_id=WorkerId(hello.worker_id),
        incarnation=Incarnation(hello.incarnation),
        model_id=ModelId(hello.model_id),
        shards=tuple(_shard_from_wire(shard) for shard in hello.shards),
        protocol_major=hello.protocol.major,
        protocol_minor=hello.protocol.minor,
    )


def _shard_to_wire(shard: Shard) -> peer_pb2.Shard:
    memories = [
        peer_pb2.Memory(
            transport=memory.transport,
            metadata=memory.metadata,
            address=memory.address,
            nbytes=memory.nbytes,
            device=memory.device,
            seal_address=memory.seal_address,
            seal_slots=memory.seal_slots,
        )
        for memory in shard.memories
    ]
    return peer_pb2.Shard(layout=layout_to_wire(shard.layout), memories=memories)


def _shard_from_wire(shard: peer_pb2.Shard) -> Shard:
    memories = tuple(
        Memory(
            transport=memory.transport,
            metadata=memory.metadata,
            address=memory.address,
            nbytes=memory.nbytes,
            device=memory.device,
            seal_address=memory.seal_address,
            seal_slots=memory.seal_slots,
        )
        for memory in shard.memories
    )
    return Shard(layout=layout_from_wire(shard.layout), memories=memories)


def _seal_to_wire(seal: Seal | None) -> peer_pb2.Seal | None:
    return None if seal is None else peer_pb2.Seal(slot=seal.slot, word=seal.word)


def _seal_from_wire(seal: peer_pb2.Seal) -> Seal | None:
    return Seal(slot=seal.slot, word=seal.word) if seal.word else None


def _abort_to_wire(abort: Abort) -> peer_pb2.Abort:
    return peer_pb2.Abort(
        lease_id=abort.lease_id, reason=abort.reason, outcome=_outcome_to_wire(abort.outcome)
    )


def _abort_from_wire(abort: peer_pb2.Abort) -> Abort:
    return Abort(
        lease_id=LeaseId(abort.lease_id),
        reason=abort.reason,
        outcome=_outcome_from_wire(abort.outcome),
    )


def _outcome_to_wire(outcome: LeaseOutcome) -> peer_pb2.Outcome:
    return cast(peer_pb2.Outcome, int(outcome))


def _outcome_from_wire(outcome: int) -> LeaseOutcome:
    return _OUTCOMES.get(outcome, LeaseOutcome.UNKNOWN)
