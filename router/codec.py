"""The RouterStream's typed messages to and from the wire; used at both ends of the stream."""

from core.blocks import pack_tokens, unpack_tokens
from core.ids import BlockHash, Incarnation, LeaseId, ModelId, Role, WorkerId
from core.messages import (
    Accepted,
    Cancel,
    DecodeSubmit,
    Handoff,
    KvEvents,
    KvRemoved,
    KvSnapshot,
    KvStored,
    LegFailed,
    LegTimes,
    LegTokens,
    LoadReport,
    Moved,
    Offer,
    Offered,
    PrefillSubmit,
    PrefixSource,
    Rejected,
    RenewLeases,
    RouterRefused,
    RouterToWorker,
    SnapshotRequest,
    TokenFrame,
    Withdraw,
    Withdrawn,
    WorkerHello,
    WorkerToRouter,
)
from core.sampling import FinishReason, SamplingParams
from core.stages import Stage
from core.step import STEP_TOKENS, StepWork
from kv_transfer.codec import (
    UnknownMessage,
    hashes_from_wire,
    layout_from_wire,
    layout_to_wire,
    sequence_id_from_wire,
    sequence_id_to_wire,
)
from wire import common_pb2, worker_pb2

_ROLE_TO_WIRE = {Role.PREFILL: common_pb2.ROLE_PREFILL, Role.DECODE: common_pb2.ROLE_DECODE}
_ROLE_FROM_WIRE = {wire: role for role, wire in _ROLE_TO_WIRE.items()}
_FINISH_TO_WIRE = {
    None: worker_pb2.FINISH_NONE,
    FinishReason.STOP: worker_pb2.FINISH_STOP,
    FinishReason.LENGTH: worker_pb2.FINISH_LENGTH,
}
_FINISH_FROM_WIRE = {wire: finish for finish, wire in _FINISH_TO_WIRE.items()}


# -- router to worker ---------------------------------------------------------------------------


def to_worker(message: RouterToWorker) -> worker_pb2.ToWorker:
    match message:
        case PrefillSubmit():
            prefill = worker_pb2.PrefillSubmit(
                number=message.number,
                sequence_id=sequence_id_to_wire(message.sequence_id),
                tokens=pack_tokens(message.tokens),
                output_position=message.output_position,
                sampling=_sampling_to_wire(message.sampling),
                deadline_s=message.deadline_s,
                cache_salt=message.cache_salt,
                source=_source_to_wire(message.source),
            )
            return worker_pb2.ToWorker(prefill=prefill)
        case DecodeSubmit():
            return worker_pb2.ToWorker(decode=_decode_to_wire(message))
        case Offer():
            return worker_pb2.ToWorker(offer=worker_pb2.Offer(number=message.number))
        case Cancel():
            cancel = worker_pb2.Cancel(number=message.number, reason=message.reason)
            return worker_pb2.ToWorker(cancel=cancel)
        case Withdraw():
            return worker_pb2.ToWorker(withdraw=worker_pb2.Withdraw(number=message.number))
        case RenewLeases():
            renew = worker_pb2.RenewLeases(lease_ids=message.lease_ids)
            return worker_pb2.ToWorker(renew_leases=renew)
        case SnapshotRequest():
            return worker_pb2.ToWorker(snapshot_request=worker_pb2.SnapshotRequest())


def from_router(message: worker_pb2.ToWorker) -> RouterToWorker:
    match message.WhichOneof("message"):
        case "prefill":
            prefill = message.prefill
            return PrefillSubmit(
                number=prefill.number,
                sequence_id=sequence_id_from_wire(prefill.sequence_id),
                tokens=_tokens_from_wire(prefill.tokens),
                output_position=prefill.output_position,
                sampling=_sampling_from_wire(prefill.sampling),
                deadline_s=prefill.deadline_s,
                cache_salt=prefill.cache_salt,
                source=_source_from_wire(prefill),
            )
        case "decode":
            return _decode_from_wire(message.decode)
        case "offer":
            return Offer(number=message.offer.number)
        case "cancel":
            return Cancel(number=message.cancel.number, reason=message.cancel.reason)
        case "withdraw":
            return Withdraw(number=message.withdraw.number)
        case "renew_leases":
            return RenewLeases(lease_ids=tuple(LeaseId(i) for i in message.renew_leases.lease_ids))
        case "snapshot_request":
            return SnapshotRequest()
        case other:
            raise UnknownMessage(f"from a router: {other}")


def _source_to_wire(source: PrefixSource | None) -> worker_pb2.PrefixSource | None:
    if source is None:
        return None
    return worker_pb2.PrefixSource(
        worker_id=source.worker_id,
        address=source.address,
        incarnation=source.incarnation,
        num_blocks=source.num_blocks,
    )


def _source_from_wire(prefill: worker_pb2.PrefillSubmit) -> PrefixSource | None:
    if not prefill.HasField("source"):
        return None
    return PrefixSource(
        worker_id=WorkerId(prefill.source.worker_id),
        address=prefill.source.address,
        incarnation=Incarnation(prefill.source.incarnation),
        num_blocks=prefill.source.num_blocks,
    )


def _decode_to_wire(message: DecodeSubmit) -> worker_pb2.DecodeSubmit:
    handoff = None
    if message.handoff is not None:
        handoff = worker_pb2.Handoff(
            owner_id=message.handoff.owner_id,
            owner_address=message.handoff.owner_address,
            owner_incarnation=message.handoff.owner_incarnation,
            lease_id=message.handoff.lease_id,
            live=message.handoff.live,
        )
    return worker_pb2.DecodeSubmit(
        number=message.number,
        sequence_id=sequence_id_to_wire(message.sequence_id),
        tokens=pack_tokens(message.tokens),
        output_position=message.output_position,
        sampling=_sampling_to_wire(message.sampling),
        deadline_s=message.deadline_s,
        cache_salt=message.cache_salt,
        handoff=handoff,
    )


def _decode_from_wire(decode: worker_pb2.DecodeSubmit) -> DecodeSubmit:
    handoff = None
    if decode.HasField("handoff"):
        handoff = Handoff(
            owner_id=WorkerId(decode.handoff.owner_id),
            owner_address=decode.handoff.owner_address,
            owner_incarnation=Incarnation(decode.handoff.owner_incarnation),
            lease_id=LeaseId(decode.handoff.lease_id),
            live=decode.handoff.live,
        )
    return DecodeSubmit(
        number=decode.number,
        sequence_id=sequence_id_from_wire(decode.sequence_id),
        tokens=_tokens_from_wire(decode.tokens),
        output_position=decode.output_position,
        sampling=_sampling_from_wire(decode.sampling),
        deadline_s=decode.deadline_s,
        handoff=handoff,
        cache_salt=decode.cache_salt,
    )


def _tokens_from_wire(packed: bytes) -> tuple[int, ...]:
    try:
        return unpack_tokens(packed)
    except ValueError:
        raise UnknownMessage(f"{len(packed)} bytes of token ids") from None


def _sampling_to_wire(sampling: SamplingParams) -> common_pb2.Sampling:
    return common_pb2.Sampling(
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=sorted(sampling.stop_token_ids),
        return_logits=sampling.return_logits,
    )


def _sampling_from_wire(sampling: common_pb2.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        seed=sampling.seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=frozenset(sampling.stop_token_ids),
        return_logits=sampling.return_logits,
    )


# -- worker to router ---------------------------------------------------------------------------


def to_router(message: WorkerToRouter) -> worker_pb2.ToRouter:
    match message:
        case TokenFrame():
            entries = [_entry_to_wire(entry) for entry in message.entries]
            return worker_pb2.ToRouter(tokens=worker_pb2.TokenFrame(entries=entries))
        case LoadReport():
            return worker_pb2.ToRouter(load=load_to_wire(message))
        case Accepted():
            accepted = worker_pb2.Accepted(
                number=message.number,
                lease_id=message.lease_id or 0,
                lease_s=message.lease_s,
            )
            return worker_pb2.ToRouter(accepted=accepted)
        case Rejected():
            rejected = worker_pb2.Rejected(
                number=message.number, code=message.code, message=message.message
            )
            return worker_pb2.ToRouter(rejected=rejected)
        case LegFailed():
            failed = worker_pb2.LegFailed(
                number=message.number,
                code=message.code,
                message=message.message,
                stage=int(message.stage),
            )
            return worker_pb2.ToRouter(failed=failed)
        case Offered():
            offered = worker_pb2.Offered(
                number=message.number,
                lease_id=message.lease_id or 0,
                lease_s=message.lease_s,
                message=message.message,
            )
            return worker_pb2.ToRouter(offered=offered)
        case Moved():
            return worker_pb2.ToRouter(moved=worker_pb2.Moved(number=message.number))
        case Withdrawn():
            withdrawn = worker_pb2.Withdrawn(number=message.number)
            return worker_pb2.ToRouter(withdrawn=withdrawn)
        case KvEvents():
            events = [_event_to_wire(event) for event in message.events]
            kv_events = worker_pb2.KvEvents(first_number=message.first_number, events=events)
            return worker_pb2.ToRouter(kv_events=kv_events)
        case KvSnapshot():
            snapshot = worker_pb2.KvSnapshot(
                next_number=message.next_number,
                hashes=b"".join(message.hashes),
                last=message.last,
            )
            return worker_pb2.ToRouter(kv_snapshot=snapshot)
        case WorkerHello():
            return worker_pb2.ToRouter(hello=hello_to_wire(message))
        case RouterRefused():
            refused = worker_pb2.RouterRefused(reason=message.reason)
            return worker_pb2.ToRouter(refused=refused)


def from_worker(message: worker_pb2.ToRouter) -> WorkerToRouter:
    match message.WhichOneof("message"):
        case "tokens":
            entries = tuple(entry_from_wire(entry) for entry in message.tokens.entries)
            return TokenFrame(entries=entries)
        case "load":
            return load_from_wire(message.load)
        case "accepted":
            accepted = message.accepted
            return Accepted(
                number=accepted.number,
                lease_id=LeaseId(accepted.lease_id) if accepted.lease_id else None,
                lease_s=accepted.lease_s,
            )
        case "rejected":
            rejected = message.rejected
            return Rejected(number=rejected.number, code=rejected.code, message=rejected.message)
        case "failed":
            failed = message.failed
            stage = Stage(min(failed.stage, int(Stage.DONE)))
            return LegFailed(
                number=failed.number, code=failed.code, message=failed.message, stage=stage
            )
        case "offered":
            offered = message.offered
            return Offered(
                number=offered.number,
                lease_id=LeaseId(offered.lease_id) if offered.lease_id else None,
                lease_s=offered.lease_s,
                message=offered.message,
            )
        case "moved" | "withdrawn" as kind:
            number = message.moved.number if kind == "moved" else message.withdrawn.number
            return Moved(number=number) if kind == "moved" else Withdrawn(number=number)
        case "kv_events":
            events = tuple(_event_from_wire(event) for event in message.kv_events.events)
            return KvEvents(first_number=message.kv_events.first_number, events=events)
        case "kv_snapshot":
            return KvSnapshot(
                next_number=message.kv_snapshot.next_number,
                hashes=hashes_from_wire(message.kv_snapshot.hashes),
                last=message.kv_snapshot.last,
            )
        case "hello":
            return hello_from_wire(message.hello)
        case "refused":
            return RouterRefused(reason=message.refused.reason)
        case other:
            raise UnknownMessage(f"from a worker: {other}")


def hello_to_wire(hello: WorkerHello) -> worker_pb2.WorkerHello:
    return worker_pb2.WorkerHello(
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        role=_ROLE_TO_WIRE[hello.role],
        epoch=hello.epoch,
        model_id=hello.model_id,
        layout=layout_to_wire(hello.layout),
        num_blocks=hello.num_blocks,
        context_tokens=hello.context_tokens,
        peer_address=hello.peer_address,
        network_domain=hello.network_domain,
        step_tokens=hello.step_tokens,
        chunk_tokens=hello.chunk_tokens,
        device=hello.device,
        protocol=common_pb2.Protocol(major=hello.protocol_major, minor=hello.protocol_minor),
    )


def hello_from_wire(hello: worker_pb2.WorkerHello) -> WorkerHello:
    role = _ROLE_FROM_WIRE.get(hello.role)
    if role is None:
        raise UnknownMessage(f"worker role {hello.role}")
    return WorkerHello(
        worker_id=WorkerId(hello.worker_id),
        incarnation=Incarnation(hello.incarnation),
        role=role,
        epoch=hello.epoch,
        model_id=ModelId(hello.model_id),
        layout=layout_from_wire(hello.layout),
        num_blocks=hello.num_blocks,
        context_tokens=hello.context_tokens,
        peer_address=hello.peer_address,
        network_domain=hello.network_domain,
        step_tokens=hello.step_tokens or STEP_TOKENS,
        chunk_tokens=hello.chunk_tokens or STEP_TOKENS,
        device=hello.device,
        protocol_major=hello.protocol.major,
        protocol_minor=hello.protocol.minor,
    )


def load_to_wire(load: LoadReport) -> worker_pb2.LoadReport:
    return worker_pb2.LoadReport(
        last_submit=load.last_submit,
        queued_tokens=load.queued_tokens,
        waiting=load.waiting,
        running=load.running,
        context_tokens=load.context_tokens,
        decoding=load.decoding,
        decoding_tokens=load.decoding_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        draining=load.draining,
        step_age_s=load.step_age_s,
        longest_step_s=load.longest_step_s,
    )


def load_from_wire(load: worker_pb2.LoadReport) -> LoadReport:
    return LoadReport(
        last_submit=load.last_submit,
        queued_tokens=load.queued_tokens,
        waiting=load.waiting,
        running=load.running,
        context_tokens=load.context_tokens,
        decoding=load.decoding,
        decoding_tokens=load.decoding_tokens,
        free_blocks=load.free_blocks,
        total_blocks=load.total_blocks,
        draining=load.draining,
        step_age_s=load.step_age_s,
        longest_step_s=load.longest_step_s,
    )


def _entry_to_wire(entry: LegTokens) -> worker_pb2.LegTokens:
    times = None
    if entry.times is not None:
        times = worker_pb2.LegTimes(
            queue_s=entry.times.queue_s,
            prefill_s=entry.times.prefill_s,
            transfer_s=entry.times.transfer_s,
            transfer_bytes=entry.times.transfer_bytes,
            transfer_blocks=entry.times.transfer_blocks,
            transfer_descriptors=entry.times.transfer_descriptors,
            transfer_hidden_s=entry.times.transfer_hidden_s,
            cached_tokens=entry.times.cached_tokens,
            fetched_tokens=entry.times.fetched_tokens,
            steps=entry.times.work.steps,
            step_tokens=entry.times.work.tokens,
            step_pairs=entry.times.work.pairs,
        )
    return worker_pb2.LegTokens(
        number=entry.number,
        tokens=entry.tokens,
        finish=_FINISH_TO_WIRE[entry.finish],
        times=times,
        logits=entry.logits,
    )


def entry_from_wire(entry: worker_pb2.LegTokens) -> LegTokens:
    """One entry of a TokenFrame."""
    times = None
    if entry.HasField("times"):
        times = LegTimes(
            queue_s=entry.times.queue_s,
            prefill_s=entry.times.prefill_s,
            work=StepWork(entry.times.steps, entry.times.step_tokens, entry.times.step_pairs),
            transfer_s=entry.times.transfer_s,
            transfer_bytes=entry.times.transfer_bytes,
            transfer_blocks=entry.times.transfer_blocks,
            transfer_descriptors=entry.times.transfer_descriptors,
            transfer_hidden_s=entry.times.transfer_hidden_s,
            cached_tokens=entry.times.cached_tokens,
            fetched_tokens=entry.times.fetched_tokens,
        )
    return LegTokens(
        number=entry.number,
        tokens=tuple(entry.tokens),
        # A reason of a newer worker is still an end.
        finish=_FINISH_FROM_WIRE.get(entry.finish, FinishReason.STOP),
        times=times,
        logits=entry.logits,
    )


def _event_to_wire(event: KvStored | KvRemoved) -> worker_pb2.KvEvent:
    hashes = b"".join(event.hashes)
    if isinstance(event, KvStored):
        return worker_pb2.KvEvent(stored=worker_pb2.KvStored(parent=event.parent, hashes=hashes))
    return worker_pb2.KvEvent(removed=worker_pb2.KvRemoved(hashes=hashes))


def _event_from_wire(event: worker_pb2.KvEvent) -> KvStored | KvRemoved:
    match event.WhichOneof("event"):
        case "stored":
            return KvStored(
                parent=BlockHash(event.stored.parent), hashes=hashes_from_wire(event.stored.hashes)
            )
        case "removed":
            return KvRemoved(hashes=hashes_from_wire(event.removed.hashes))
        case other:
            raise UnknownMessage(f"KV event {other}")
