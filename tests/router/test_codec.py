"""The RouterStream's messages cross the wire unchanged, and newer ones do no harm."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.blocks import HASH_BYTES
from core.ids import Role, SequenceId
from core.kv import DTYPE_BYTES, KvLayout
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
from core.step import StepWork
from kv_transfer.codec import UnknownMessage
from router.codec import from_router, from_worker, to_router, to_worker
from tests.builders import NEWER_FIELD, NEWER_MESSAGE, QUICK
from wire import worker_pb2

TEXT = st.text(max_size=12)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
SECONDS = st.floats(0, 1e9)
TOKENS = st.lists(U32, max_size=6).map(tuple)
HASH = st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES)
HASHES = st.lists(HASH, max_size=4).map(tuple)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=U32,
    seed=U64,
    temperature=st.floats(0, 2),
    top_p=st.floats(0, 1),
    top_k=U32,
    stop_token_ids=st.frozensets(U32, max_size=4),
    return_logits=st.booleans(),
)
SUBMIT = {
    "number": U64,
    "sequence_id": st.builds(SequenceId, TEXT, U32, U32),
    "tokens": TOKENS,
    "output_position": U32,
    "sampling": SAMPLING,
    "deadline_s": SECONDS,
    "cache_salt": TEXT,
}
HANDOFF = st.builds(
    Handoff,
    owner_id=TEXT,
    owner_address=TEXT,
    owner_incarnation=TEXT,
    lease_id=U64,
    live=st.booleans(),
)
ROUTER = {
    PrefillSubmit: st.builds(
        PrefillSubmit,
        source=st.none()
        | st.builds(PrefixSource, worker_id=TEXT, address=TEXT, incarnation=TEXT, num_blocks=U32),
        **SUBMIT,
    ),
    DecodeSubmit: st.builds(DecodeSubmit, handoff=st.none() | HANDOFF, **SUBMIT),
    Offer: st.builds(Offer, number=U64),
    Cancel: st.builds(Cancel, number=U64, reason=TEXT),
    Withdraw: st.builds(Withdraw, number=U64),
    RenewLeases: st.builds(RenewLeases, lease_ids=st.lists(U64, max_size=4).map(tuple)),
    SnapshotRequest: st.just(SnapshotRequest()),
}
LAYOUT = st.builds(
    KvLayout,
    block_size=U32,
    num_kv_heads=U32,
    num_layers=U32,
    head_dim=U32,
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    tp_size=st.integers(1, 64),
    tp_rank=U32,
)
TIMES = st.builds(
    LegTimes,
    queue_s=SECONDS,
    prefill_s=SECONDS,
    work=st.builds(StepWork, U32, U64, SECONDS),
    transfer_s=SECONDS,
    transfer_bytes=U64,
    transfer_blocks=U32,
    transfer_descriptors=U32,
    transfer_hidden_s=SECONDS,
    cached_tokens=U32,
    fetched_tokens=U32,
)
ENTRY = st.builds(
    LegTokens,
    number=U64,
    tokens=TOKENS,
    finish=st.none() | st.sampled_from(FinishReason),
    times=st.none() | TIMES,
    logits=st.binary(max_size=20),
)
EVENT = st.one_of(
    st.builds(KvStored, parent=HASH, hashes=HASHES), st.builds(KvRemoved, hashes=HASHES)
)
WORKER = {
    WorkerHello: st.builds(
        WorkerHello,
        worker_id=TEXT,
        incarnation=TEXT,
        role=st.sampled_from(Role),
        epoch=U32,
        model_id=TEXT,
        layout=LAYOUT,
        num_blocks=U32,
        context_tokens=U32,
        peer_address=TEXT,
        network_domain=TEXT,
        step_tokens=st.integers(1, 2**32 - 1),
        chunk_tokens=st.integers(1, 2**32 - 1),
        protocol_major=U32,
        protocol_minor=U32,
    ),
    Accepted: st.builds(
        Accepted,
        number=U64,
        lease_id=st.none() | st.integers(1, 2**64 - 1),
        lease_s=SECONDS,
    ),
    Rejected: st.builds(Rejected, number=U64, code=TEXT, message=TEXT),
    TokenFrame: st.builds(TokenFrame, entries=st.lists(ENTRY, max_size=4).map(tuple)),
    LegFailed: st.builds(
        LegFailed, number=U64, code=TEXT, message=TEXT, stage=st.sampled_from(Stage)
    ),
    Offered: st.builds(
        Offered,
        number=U64,
        lease_id=st.none() | st.integers(1, 2**64 - 1),
        lease_s=SECONDS,
        message=TEXT,
    ),
    Moved: st.builds(Moved, number=U64),
    Withdrawn: st.builds(Withdrawn, number=U64),
    RouterRefused: st.builds(RouterRefused, reason=TEXT),
    LoadReport: st.builds(
        LoadReport,
        last_submit=U64,
        queued_tokens=U64,
        waiting=U32,
        running=U32,
        context_tokens=U64,
        free_blocks=U32,
        total_blocks=U32,
        draining=st.booleans(),
        step_age_s=SECONDS,
        longest_step_s=SECONDS,
    ),
    KvEvents: st.builds(KvEvents, first_number=U64, events=st.lists(EVENT, max_size=4).map(tuple)),
    KvSnapshot: st.builds(KvSnapshot, next_number=U64, hashes=HASHES, last=st.booleans()),
}
FROM_ROUTER = st.one_of(*ROUTER.values())
FROM_WORKER = st.one_of(*WORKER.values())


def test_every_kind_of_message_is_tried() -> None:
    assert set(ROUTER) == set(get_args(RouterToWorker))
    assert set(WORKER) == set(get_args(WorkerToRouter))


@QUICK
@given(FROM_ROUTER)
def test_what_a_router_says_arrives(message: RouterToWorker) -> None:
    data = to_worker(message).SerializeToString()
    assert from_router(worker_pb2.ToWorker.FromString(data)) == message


@QUICK
@given(FROM_WORKER)
def test_what_a_worker_says_arrives(message: WorkerToRouter) -> None:
    data = to_router(message).SerializeToString()
    assert from_worker(worker_pb2.ToRouter.FromString(data)) == message


@QUICK
@given(FROM_ROUTER)
def test_a_field_of_a_newer_router_is_ignored(message: RouterToWorker) -> None:
    data = to_worker(message).SerializeToString() + NEWER_FIELD
    assert from_router(worker_pb2.ToWorker.FromString(data)) == message


@QUICK
@given(FROM_WORKER)
def test_a_field_of_a_newer_worker_is_ignored(message: WorkerToRouter) -> None:
    data = to_router(message).SerializeToString() + NEWER_FIELD
    assert from_worker(worker_pb2.ToRouter.FromString(data)) == message


def test_a_message_kind_of_a_newer_peer_is_named_unknown() -> None:
    with pytest.raises(UnknownMessage):
        from_router(worker_pb2.ToWorker.FromString(NEWER_MESSAGE))
    with pytest.raises(UnknownMessage):
        from_worker(worker_pb2.ToRouter.FromString(NEWER_MESSAGE))


def test_a_cache_event_of_a_newer_worker_is_named_unknown() -> None:
    event = worker_pb2.KvEvent.FromString(NEWER_MESSAGE)
    message = worker_pb2.ToRouter(kv_events=worker_pb2.KvEvents(first_number=1, events=[event]))
    with pytest.raises(UnknownMessage):
        from_worker(message)


def test_a_stage_of_a_newer_worker_is_taken_as_the_last_known() -> None:
    failed = from_worker(worker_pb2.ToRouter(failed=worker_pb2.LegFailed(number=1, stage=99)))
    assert isinstance(failed, LegFailed)
    assert failed.stage is Stage.DONE


def test_a_role_of_a_newer_worker_is_named_unknown() -> None:
    hello = worker_pb2.WorkerHello.FromString(b"\x18\x63")  # role = 99
    with pytest.raises(UnknownMessage, match="99"):
        from_worker(worker_pb2.ToRouter(hello=hello))


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_a_submit_with_a_token_cut_in_two_is_skipped(kind):
    raw = worker_pb2.ToWorker()
    getattr(raw, kind).tokens = b"12345"
    with pytest.raises(UnknownMessage, match="5 bytes of token ids"):
        from_router(raw)
