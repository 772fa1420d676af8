from wire import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Finish(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_NONE: _ClassVar[Finish]
    FINISH_STOP: _ClassVar[Finish]
    FINISH_LENGTH: _ClassVar[Finish]
FINISH_NONE: Finish
FINISH_STOP: Finish
FINISH_LENGTH: Finish

class ToWorker(_message.Message):
    __slots__ = ("hello", "prefill", "decode", "cancel", "renew_leases", "snapshot_request", "offer", "withdraw")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RENEW_LEASES_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    hello: RouterHello
    prefill: PrefillSubmit
    decode: DecodeSubmit
    cancel: Cancel
    renew_leases: RenewLeases
    snapshot_request: SnapshotRequest
    offer: Offer
    withdraw: Withdraw
    def __init__(self, hello: _Optional[_Union[RouterHello, _Mapping]] = ..., prefill: _Optional[_Union[PrefillSubmit, _Mapping]] = ..., decode: _Optional[_Union[DecodeSubmit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., renew_leases: _Optional[_Union[RenewLeases, _Mapping]] = ..., snapshot_request: _Optional[_Union[SnapshotRequest, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., withdraw: _Optional[_Union[Withdraw, _Mapping]] = ...) -> None: ...

class ToRouter(_message.Message):
    __slots__ = ("hello", "accepted", "rejected", "tokens", "failed", "load", "kv_events", "kv_snapshot", "offered", "moved", "refused", "withdrawn")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    KV_EVENTS_FIELD_NUMBER: _ClassVar[int]
    KV_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    OFFERED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    hello: WorkerHello
    accepted: Accepted
    rejected: Rejected
    tokens: TokenFrame
    failed: LegFailed
    load: LoadReport
    kv_events: KvEvents
    kv_snapshot: KvSnapshot
    offered: Offered
    moved: Moved
    refused: RouterRefused
    withdrawn: Withdrawn
    def __init__(self, hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., accepted: _Optional[_Union[Accepted, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., tokens: _Optional[_Union[TokenFrame, _Mapping]] = ..., failed: _Optional[_Union[LegFailed, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., kv_events: _Optional[_Union[KvEvents, _Mapping]] = ..., kv_snapshot: _Optional[_Union[KvSnapshot, _Mapping]] = ..., offered: _Optional[_Union[Offered, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., refused: _Optional[_Union[RouterRefused, _Mapping]] = ..., withdrawn: _Optional[_Union[Withdrawn, _Mapping]] = ...) -> None: ...

class RouterHello(_message.Message):
    __slots__ = ("router_id", "protocol")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    protocol: _common_pb2.Protocol
    def __init__(self, router_id: _Optional[str] = ..., protocol: _Optional[_Union[_common_pb2.Protocol, _Mapping]] = ...) -> None: ...

class PrefillSubmit(_message.Message):
    __slots__ = ("number", "sequence_id", "tokens", "output_position", "sampling", "deadline_s", "cache_salt", "source")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_POSITION_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    number: int
    sequence_id: _common_pb2.SequenceId
    tokens: bytes
    output_position: int
    sampling: _common_pb2.Sampling
    deadline_s: float
    cache_salt: str
    source: PrefixSource
    def __init__(self, number: _Optional[int] = ..., sequence_id: _Optional[_Union[_common_pb2.SequenceId, _Mapping]] = ..., tokens: _Optional[bytes] = ..., output_position: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., deadline_s: _Optional[float] = ..., cache_salt: _Optional[str] = ..., source: _Optional[_Union[PrefixSource, _Mapping]] = ...) -> None: ...

class PrefixSource(_message.Message):
    __slots__ = ("worker_id", "address", "incarnation", "num_blocks")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    incarnation: str
    num_blocks: int
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("owner_id", "owner_address", "owner_incarnation", "lease_id", "live")
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    OWNER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    owner_id: str
    owner_address: str
    owner_incarnation: str
    lease_id: int
    live: bool
    def __init__(self, owner_id: _Optional[str] = ..., owner_address: _Optional[str] = ..., owner_incarnation: _Optional[str] = ..., lease_id: _Optional[int] = ..., live: _Optional[bool] = ...) -> None: ...

class DecodeSubmit(_message.Message):
    __slots__ = ("number", "sequence_id", "tokens", "output_position", "sampling", "deadline_s", "cache_salt", "handoff")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_POSITION_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    number: int
    sequence_id: _common_pb2.SequenceId
    tokens: bytes
    output_position: int
    sampling: _common_pb2.Sampling
    deadline_s: float
    cache_salt: str
    handoff: Handoff
    def __init__(self, number: _Optional[int] = ..., sequence_id: _Optional[_Union[_common_pb2.SequenceId, _Mapping]] = ..., tokens: _Optional[bytes] = ..., output_position: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., deadline_s: _Optional[float] = ..., cache_salt: _Optional[str] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Offered(_message.Message):
    __slots__ = ("number", "lease_id", "lease_s", "message")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    lease_id: int
    lease_s: float
    message: str
    def __init__(self, number: _Optional[int] = ..., lease_id: _Optional[int] = ..., lease_s: _Optional[float] = ..., message: _Optional[str] = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Withdrawn(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("number", "reason")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    number: int
    reason: str
    def __init__(self, number: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class RenewLeases(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerHello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "epoch", "model_id", "layout", "num_blocks", "context_tokens", "peer_address", "protocol", "network_domain", "step_tokens", "chunk_tokens", "device")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PEER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NETWORK_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: _common_pb2.Role
    epoch: int
    model_id: str
    layout: _common_pb2.KvLayout
    num_blocks: int
    context_tokens: int
    peer_address: str
    protocol: _common_pb2.Protocol
    network_domain: str
    step_tokens: int
    chunk_tokens: int
    device: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., epoch: _Optional[int] = ..., model_id: _Optional[str] = ..., layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., num_blocks: _Optional[int] = ..., context_tokens: _Optional[int] = ..., peer_address: _Optional[str] = ..., protocol: _Optional[_Union[_common_pb2.Protocol, _Mapping]] = ..., network_domain: _Optional[str] = ..., step_tokens: _Optional[int] = ..., chunk_tokens: _Optional[int] = ..., device: _Optional[str] = ...) -> None: ...

class RouterRefused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("number", "lease_id", "lease_s")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    number: int
    lease_id: int
    lease_s: float
    def __init__(self, number: _Optional[int] = ..., lease_id: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("number", "code", "message")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    code: str
    message: str
    def __init__(self, number: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class LegTimes(_message.Message):
    __slots__ = ("queue_s", "prefill_s", "transfer_s", "transfer_bytes", "transfer_blocks", "cached_tokens", "transfer_descriptors", "transfer_hidden_s", "fetched_tokens", "steps", "step_tokens", "step_pairs")
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    FETCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_PAIRS_FIELD_NUMBER: _ClassVar[int]
    queue_s: float
    prefill_s: float
    transfer_s: float
    transfer_bytes: int
    transfer_blocks: int
    cached_tokens: int
    transfer_descriptors: int
    transfer_hidden_s: float
    fetched_tokens: int
    steps: int
    step_tokens: int
    step_pairs: float
    def __init__(self, queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_s: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., transfer_blocks: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., transfer_descriptors: _Optional[int] = ..., transfer_hidden_s: _Optional[float] = ..., fetched_tokens: _Optional[int] = ..., steps: _Optional[int] = ..., step_tokens: _Optional[int] = ..., step_pairs: _Optional[float] = ...) -> None: ...

class LegTokens(_message.Message):
    __slots__ = ("number", "tokens", "finish", "times", "logits")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    TIMES_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    number: int
    tokens: _containers.RepeatedScalarFieldContainer[int]
    finish: Finish
    times: LegTimes
    logits: bytes
    def __init__(self, number: _Optional[int] = ..., tokens: _Optional[_Iterable[int]] = ..., finish: _Optional[_Union[Finish, str]] = ..., times: _Optional[_Union[LegTimes, _Mapping]] = ..., logits: _Optional[bytes] = ...) -> None: ...

class TokenFrame(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[LegTokens]
    def __init__(self, entries: _Optional[_Iterable[_Union[LegTokens, _Mapping]]] = ...) -> None: ...

class LegFailed(_message.Message):
    __slots__ = ("number", "code", "message", "stage")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    number: int
    code: str
    message: str
    stage: int
    def __init__(self, number: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ..., stage: _Optional[int] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("last_submit", "queued_tokens", "waiting", "running", "context_tokens", "free_blocks", "total_blocks", "draining", "decoding", "decoding_tokens", "step_age_s", "longest_step_s")
    LAST_SUBMIT_FIELD_NUMBER: _ClassVar[int]
    QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    DECODING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LONGEST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    last_submit: int
    queued_tokens: int
    waiting: int
    running: int
    context_tokens: int
    free_blocks: int
    total_blocks: int
    draining: bool
    decoding: int
    decoding_tokens: int
    step_age_s: float
    longest_step_s: float
    def __init__(self, last_submit: _Optional[int] = ..., queued_tokens: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., context_tokens: _Optional[int] = ..., free_blocks: _Optional[int] = ..., total_blocks: _Optional[int] = ..., draining: _Optional[bool] = ..., decoding: _Optional[int] = ..., decoding_tokens: _Optional[int] = ..., step_age_s: _Optional[float] = ..., longest_step_s: _Optional[float] = ...) -> None: ...

class KvStored(_message.Message):
    __slots__ = ("parent", "hashes")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    parent: bytes
    hashes: bytes
    def __init__(self, parent: _Optional[bytes] = ..., hashes: _Optional[bytes] = ...) -> None: ...

class KvRemoved(_message.Message):
    __slots__ = ("hashes",)
    HASHES_FIELD_NUMBER: _ClassVar[int]
    hashes: bytes
    def __init__(self, hashes: _Optional[bytes] = ...) -> None: ...

class KvEvent(_message.Message):
    __slots__ = ("stored", "removed")
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    stored: KvStored
    removed: KvRemoved
    def __init__(self, stored: _Optional[_Union[KvStored, _Mapping]] = ..., removed: _Optional[_Union[KvRemoved, _Mapping]] = ...) -> None: ...

class KvEvents(_message.Message):
    __slots__ = ("first_number", "events")
    FIRST_NUMBER_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    first_number: int
    events: _containers.RepeatedCompositeFieldContainer[KvEvent]
    def __init__(self, first_number: _Optional[int] = ..., events: _Optional[_Iterable[_Union[KvEvent, _Mapping]]] = ...) -> None: ...

class KvSnapshot(_message.Message):
    __slots__ = ("next_number", "hashes", "last")
    NEXT_NUMBER_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    next_number: int
    hashes: bytes
    last: bool
    def __init__(self, next_number: _Optional[int] = ..., hashes: _Optional[bytes] = ..., last: _Optional[bool] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "sequence_id", "reader", "blocks", "age_s", "expires_in_s")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    sequence_id: _common_pb2.SequenceId
    reader: str
    blocks: int
    age_s: float
    expires_in_s: float
    def __init__(self, lease_id: _Optional[int] = ..., sequence_id: _Optional[_Union[_common_pb2.SequenceId, _Mapping]] = ..., reader: _Optional[str] = ..., blocks: _Optional[int] = ..., age_s: _Optional[float] = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("who", "load", "blocks_free", "blocks_cached", "blocks_in_use", "blocks_receiving", "blocks_quarantined", "blocks_held", "pool_error", "leases", "leases_opened", "leases_closed", "leases_aborted", "leases_expired", "pid", "open_legs", "transports", "peers", "preemptions", "prefix_fetches", "leases_withdrawn", "readers", "metrics_address")
    WHO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_IN_USE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_RECEIVING_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_QUARANTINED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    POOL_ERROR_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    LEASES_OPENED_FIELD_NUMBER: _ClassVar[int]
    LEASES_CLOSED_FIELD_NUMBER: _ClassVar[int]
    LEASES_ABORTED_FIELD_NUMBER: _ClassVar[int]
    LEASES_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    OPEN_LEGS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FETCHES_FIELD_NUMBER: _ClassVar[int]
    LEASES_WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    READERS_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    who: WorkerHello
    load: LoadReport
    blocks_free: int
    blocks_cached: int
    blocks_in_use: int
    blocks_receiving: int
    blocks_quarantined: int
    blocks_held: int
    pool_error: str
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    leases_opened: int
    leases_closed: int
    leases_aborted: int
    leases_expired: int
    pid: int
    open_legs: int
    transports: _containers.RepeatedScalarFieldContainer[str]
    peers: _containers.RepeatedCompositeFieldContainer[PeerTransfers]
    preemptions: int
    prefix_fetches: PrefixFetches
    leases_withdrawn: int
    readers: _containers.RepeatedCompositeFieldContainer[ReaderLeases]
    metrics_address: str
    def __init__(self, who: _Optional[_Union[WorkerHello, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_in_use: _Optional[int] = ..., blocks_receiving: _Optional[int] = ..., blocks_quarantined: _Optional[int] = ..., blocks_held: _Optional[int] = ..., pool_error: _Optional[str] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ..., leases_opened: _Optional[int] = ..., leases_closed: _Optional[int] = ..., leases_aborted: _Optional[int] = ..., leases_expired: _Optional[int] = ..., pid: _Optional[int] = ..., open_legs: _Optional[int] = ..., transports: _Optional[_Iterable[str]] = ..., peers: _Optional[_Iterable[_Union[PeerTransfers, _Mapping]]] = ..., preemptions: _Optional[int] = ..., prefix_fetches: _Optional[_Union[PrefixFetches, _Mapping]] = ..., leases_withdrawn: _Optional[int] = ..., readers: _Optional[_Iterable[_Union[ReaderLeases, _Mapping]]] = ..., metrics_address: _Optional[str] = ...) -> None: ...

class PrefixFetches(_message.Message):
    __slots__ = ("tried", "won", "tokens", "shared", "failed", "skipped")
    class FailedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class SkippedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    TRIED_FIELD_NUMBER: _ClassVar[int]
    WON_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    tried: int
    won: int
    tokens: int
    shared: int
    failed: _containers.ScalarMap[str, int]
    skipped: _containers.ScalarMap[str, int]
    def __init__(self, tried: _Optional[int] = ..., won: _Optional[int] = ..., tokens: _Optional[int] = ..., shared: _Optional[int] = ..., failed: _Optional[_Mapping[str, int]] = ..., skipped: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ReaderLeases(_message.Message):
    __slots__ = ("reader_id", "ended")
    class EndedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    READER_ID_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    reader_id: str
    ended: _containers.ScalarMap[str, int]
    def __init__(self, reader_id: _Optional[str] = ..., ended: _Optional[_Mapping[str, int]] = ...) -> None: ...

class PeerTransfers(_message.Message):
    __slots__ = ("owner_id", "transport", "handoffs", "reads", "nbytes", "blocks", "descriptors", "seconds", "hidden_s", "failures", "sealed")
    class FailuresEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    HANDOFFS_FIELD_NUMBER: _ClassVar[int]
    READS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_S_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    owner_id: str
    transport: str
    handoffs: int
    reads: int
    nbytes: int
    blocks: int
    descriptors: int
    seconds: float
    hidden_s: float
    failures: _containers.ScalarMap[str, int]
    sealed: int
    def __init__(self, owner_id: _Optional[str] = ..., transport: _Optional[str] = ..., handoffs: _Optional[int] = ..., reads: _Optional[int] = ..., nbytes: _Optional[int] = ..., blocks: _Optional[int] = ..., descriptors: _Optional[int] = ..., seconds: _Optional[float] = ..., hidden_s: _Optional[float] = ..., failures: _Optional[_Mapping[str, int]] = ..., sealed: _Optional[int] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("drained", "legs_left")
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    LEGS_LEFT_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    legs_left: int
    def __init__(self, drained: _Optional[bool] = ..., legs_left: _Optional[int] = ...) -> None: ...
