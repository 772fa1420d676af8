"""What two workers say to each other over a PeerStream, as typed values.

The reader opens the stream, one per owner it reads from. Both say hello first.

    reader -> owner   PeerHello | Bind | Renew | Close | Abort
    owner -> reader   PeerHello | Announce | Renewed | Closed | Abort

    Bind        once per lease: this reader wants the blocks from `first_block` on
    Announce    blocks that are final, in order; the last one is `final` and has the first token
    Renew       keeps the bound leases alive while the reader works; answered by Renewed, so that
                a reader notices a silent owner
    Close       after the last read has ended: may I use what I read?
    Closed      HELD: the blocks were held without a break since they were announced. Only this
                answer makes them usable; any other answer, or none, discards them.
    Abort       either side ends the lease early; never answered
"""

from dataclasses import dataclass
from enum import IntEnum

from core.ids import BlockId, Incarnation, LeaseId, ModelId, SequenceId, WorkerId
from core.kv import KvLayout
from core.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR


class LeaseOutcome(IntEnum):
    """How a lease ended, in answer to the closing question."""

    UNKNOWN = 0
    HELD = 1
    EXPIRED = 2
    ABORTED = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Where an owner's arena can be read: transport name, its metadata, base address and size."""

    transport: str
    metadata: bytes
    address: int
    nbytes: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHello:
    """Who speaks. `model_id` must be equal on both sides."""

    worker_id: WorkerId
    incarnation: Incarnation
    model_id: ModelId
    layout: KvLayout
    memory: Memory
    protocol_major: int = PROTOCOL_MAJOR
    protocol_minor: int = PROTOCOL_MINOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    lease_id: LeaseId
    sequence_id: SequenceId
    first_block: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """`block_ids[i]` holds block `first_index + i` of the sequence, in the owner's arena."""

    lease_id: LeaseId
    sequence_id: SequenceId
    first_index: int
    block_ids: tuple[BlockId, ...]
    final: bool = False
    first_token: int = 0
    ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    lease_ids: tuple[LeaseId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """The owner lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    lease_id: LeaseId
    outcome: LeaseOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    lease_id: LeaseId
    reason: str


FromReader = PeerHello | Bind | Renew | Close | Abort
FromOwner = PeerHello | Announce | Renewed | Closed | Abort
