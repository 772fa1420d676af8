from wire import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNKNOWN: _ClassVar[Outcome]
    OUTCOME_HELD: _ClassVar[Outcome]
    OUTCOME_EXPIRED: _ClassVar[Outcome]
    OUTCOME_ABORTED: _ClassVar[Outcome]
    OUTCOME_WITHDRAWN: _ClassVar[Outcome]
OUTCOME_UNKNOWN: Outcome
OUTCOME_HELD: Outcome
OUTCOME_EXPIRED: Outcome
OUTCOME_ABORTED: Outcome
OUTCOME_WITHDRAWN: Outcome

class PeerHello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "model_id", "protocol", "shards")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    model_id: str
    protocol: _common_pb2.Protocol
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., model_id: _Optional[str] = ..., protocol: _Optional[_Union[_common_pb2.Protocol, _Mapping]] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("layout", "memories")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MEMORIES_FIELD_NUMBER: _ClassVar[int]
    layout: _common_pb2.KvLayout
    memories: _containers.RepeatedCompositeFieldContainer[Memory]
    def __init__(self, layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ..., memories: _Optional[_Iterable[_Union[Memory, _Mapping]]] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("transport", "metadata", "address", "nbytes", "device", "seal_address", "seal_slots")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SEAL_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SEAL_SLOTS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    metadata: bytes
    address: int
    nbytes: int
    device: str
    seal_address: int
    seal_slots: int
    def __init__(self, transport: _Optional[str] = ..., metadata: _Optional[bytes] = ..., address: _Optional[int] = ..., nbytes: _Optional[int] = ..., device: _Optional[str] = ..., seal_address: _Optional[int] = ..., seal_slots: _Optional[int] = ...) -> None: ...

class FromReader(_message.Message):
    __slots__ = ("hello", "bind", "renew", "close", "abort", "fetch", "ready")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BIND_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    FETCH_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    hello: PeerHello
    bind: Bind
    renew: Renew
    close: Close
    abort: Abort
    fetch: Fetch
    ready: Ready
    def __init__(self, hello: _Optional[_Union[PeerHello, _Mapping]] = ..., bind: _Optional[_Union[Bind, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., fetch: _Optional[_Union[Fetch, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ...) -> None: ...

class FromOwner(_message.Message):
    __slots__ = ("hello", "announce", "closed", "abort", "renewed", "fetched", "refused")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RENEWED_FIELD_NUMBER: _ClassVar[int]
    FETCHED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    hello: PeerHello
    announce: Announce
    closed: Closed
    abort: Abort
    renewed: Renewed
    fetched: Fetched
    refused: Refused
    def __init__(self, hello: _Optional[_Union[PeerHello, _Mapping]] = ..., announce: _Optional[_Union[Announce, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., renewed: _Optional[_Union[Renewed, _Mapping]] = ..., fetched: _Optional[_Union[Fetched, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Bind(_message.Message):
    __slots__ = ("lease_id", "sequence_id", "first_index")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    sequence_id: _common_pb2.SequenceId
    first_index: int
    def __init__(self, lease_id: _Optional[int] = ..., sequence_id: _Optional[_Union[_common_pb2.SequenceId, _Mapping]] = ..., first_index: _Optional[int] = ...) -> None: ...

class Fetch(_message.Message):
    __slots__ = ("number", "sequence_id", "hashes", "first_index")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    number: int
    sequence_id: _common_pb2.SequenceId
    hashes: bytes
    first_index: int
    def __init__(self, number: _Optional[int] = ..., sequence_id: _Optional[_Union[_common_pb2.SequenceId, _Mapping]] = ..., hashes: _Optional[bytes] = ..., first_index: _Optional[int] = ...) -> None: ...

class Fetched(_message.Message):
    __slots__ = ("number", "lease_id", "block_ids", "seal")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    number: int
    lease_id: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    seal: Seal
    def __init__(self, number: _Optional[int] = ..., lease_id: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ...) -> None: ...

class Seal(_message.Message):
    __slots__ = ("slot", "word")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    WORD_FIELD_NUMBER: _ClassVar[int]
    slot: int
    word: int
    def __init__(self, slot: _Optional[int] = ..., word: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class Announce(_message.Message):
    __slots__ = ("lease_id", "sequence_id", "first_index", "block_ids", "final", "tokens", "ended", "seal")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    SEAL_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    sequence_id: _common_pb2.SequenceId
    first_index: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    final: bool
    tokens: _containers.RepeatedScalarFieldContainer[int]
    ended: bool
    seal: Seal
    def __init__(self, lease_id: _Optional[int] = ..., sequence_id: _Optional[_Union[_common_pb2.SequenceId, _Mapping]] = ..., first_index: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., final: _Optional[bool] = ..., tokens: _Optional[_Iterable[int]] = ..., ended: _Optional[bool] = ..., seal: _Optional[_Union[Seal, _Mapping]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ("lease_ids",)
    LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    lease_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Renewed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Close(_message.Message):
    __slots__ = ("lease_id", "verify")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    verify: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[int] = ..., verify: _Optional[_Iterable[int]] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("lease_id", "outcome", "checksums")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    outcome: Outcome
    checksums: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease_id: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., checksums: _Optional[_Iterable[int]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("lease_id", "reason", "outcome")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    reason: str
    outcome: Outcome
    def __init__(self, lease_id: _Optional[int] = ..., reason: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, str]] = ...) -> None: ...
