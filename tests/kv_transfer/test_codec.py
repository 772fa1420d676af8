"""The PeerStream's messages cross the wire unchanged, and newer ones do no harm."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.ids import SequenceId
from core.kv import BLOCK_FIRST, DTYPE_BYTES, KvLayout
from kv_transfer.codec import (
    UnknownMessage,
    from_owner_from_wire,
    from_owner_to_wire,
    from_reader_from_wire,
    from_reader_to_wire,
)
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
    Renew,
    Renewed,
    Shard,
)
from tests.builders import NEWER_FIELD, NEWER_MESSAGE, QUICK
from wire import peer_pb2

TEXT = st.text(max_size=12)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
SEQUENCE = st.builds(SequenceId, TEXT, U32, U32)
LAYOUT = st.builds(
    KvLayout,
    block_size=U32,
    num_kv_heads=U32,
    num_layers=U32,
    head_dim=U32,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    tp_size=st.integers(1, 64),
    tp_rank=U32,
    total_kv_heads=U32,
    sides=st.integers(1, 2),
    axes=st.permutations(BLOCK_FIRST).map(tuple),
)
MEMORY = st.builds(
    Memory,
    transport=TEXT,
    metadata=st.binary(max_size=20),
    address=U64,
    nbytes=U64,
    device=TEXT,
)
HELLO = st.builds(
    PeerHello,
    worker_id=TEXT,
    incarnation=TEXT,
    model_id=TEXT,
    shards=st.lists(
        st.builds(Shard, layout=LAYOUT, memories=st.lists(MEMORY, max_size=2).map(tuple)),
        max_size=2,
    ).map(tuple),
    protocol_major=U32,
    protocol_minor=U32,
)
ABORT = st.builds(Abort, lease_id=U64, reason=TEXT, outcome=st.sampled_from(LeaseOutcome))
READER = st.one_of(
    HELLO,
    st.builds(Bind, lease_id=U64, sequence_id=SEQUENCE, first_index=U32),
    st.builds(Renew, lease_ids=st.lists(U64, max_size=4).map(tuple)),
    st.builds(
        Fetch,
        number=U64,
        sequence_id=SEQUENCE,
        hashes=st.lists(st.binary(min_size=16, max_size=16), max_size=4).map(tuple),
        first_index=U32,
    ),
    st.builds(Ready, lease_id=U64),
    st.builds(Close, lease_id=U64, verify=st.lists(U32, max_size=4).map(tuple)),
    ABORT,
)
OWNER = st.one_of(
    HELLO,
    st.builds(
        Announce,
        lease_id=U64,
        sequence_id=SEQUENCE,
        first_index=U32,
        block_ids=st.lists(U32, max_size=4).map(tuple),
        final=st.booleans(),
        tokens=st.lists(U32, max_size=4).map(tuple),
        ended=st.booleans(),
    ),
    st.builds(
        Closed,
        lease_id=U64,
        outcome=st.sampled_from(LeaseOutcome),
        checksums=st.lists(U32, max_size=4).map(tuple),
    ),
    st.builds(Fetched, number=U64, lease_id=U64, block_ids=st.lists(U32, max_size=4).map(tuple)),
    st.just(Renewed()),
    ABORT,
)


@QUICK
@given(READER)
def test_what_a_reader_says_arrives(message: FromReader) -> None:
    data = from_reader_to_wire(message).SerializeToString()
    assert from_reader_from_wire(peer_pb2.FromReader.FromString(data)) == message


@QUICK
@given(OWNER)
def test_what_an_owner_says_arrives(message: FromOwner) -> None:
    data = from_owner_to_wire(message).SerializeToString()
    assert from_owner_from_wire(peer_pb2.FromOwner.FromString(data)) == message


@QUICK
@given(READER)
def test_a_field_of_a_newer_reader_is_ignored(message: FromReader) -> None:
    data = from_reader_to_wire(message).SerializeToString() + NEWER_FIELD
    assert from_reader_from_wire(peer_pb2.FromReader.FromString(data)) == message


@QUICK
@given(OWNER)
def test_a_field_of_a_newer_owner_is_ignored(message: FromOwner) -> None:
    data = from_owner_to_wire(message).SerializeToString() + NEWER_FIELD
    assert from_owner_from_wire(peer_pb2.FromOwner.FromString(data)) == message


def test_a_field_inside_a_newer_message_is_ignored() -> None:
    bind = peer_pb2.Bind(lease_id=3).SerializeToString() + NEWER_FIELD
    message = peer_pb2.FromReader(bind=peer_pb2.Bind.FromString(bind))
    read = from_reader_from_wire(peer_pb2.FromReader.FromString(message.SerializeToString()))
    assert isinstance(read, Bind)
    assert read.lease_id == 3


def test_a_message_kind_of_a_newer_peer_is_named_unknown() -> None:
    with pytest.raises(UnknownMessage):
        from_reader_from_wire(peer_pb2.FromReader.FromString(NEWER_MESSAGE))
    with pytest.raises(UnknownMessage):
        from_owner_from_wire(peer_pb2.FromOwner.FromString(NEWER_MESSAGE))


def test_an_outcome_of_a_newer_owner_does_not_make_blocks_usable() -> None:
    data = peer_pb2.Closed(lease_id=1).SerializeToString() + b"\x10\x63"  # outcome = 99
    message = peer_pb2.FromOwner(closed=peer_pb2.Closed.FromString(data))
    assert from_owner_from_wire(message) == Closed(lease_id=1, outcome=LeaseOutcome.UNKNOWN)  # type: ignore[arg-type]


def test_a_kv_dtype_of_a_newer_peer_is_named_unknown() -> None:
    message = peer_pb2.FromOwner()
    message.hello.shards.add().layout.dtype = "float4"
    with pytest.raises(UnknownMessage, match="float4"):
        from_owner_from_wire(message)
