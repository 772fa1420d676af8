"""What two workers say to each other over a PeerStream, as typed values.

The reader opens the stream, one per owner it reads from. Both say hello first.

    reader -> owner   PeerHello | Bind | Fetch | Ready | Renew | Close | Abort
    owner -> reader   PeerHello | Refused | Announce | Fetched | Renewed | Closed | Abort

    Refused     this reader is not served, and why; the stream ends
    Bind        this reader wants the blocks of a lease from `first_index` on; sent again when
                nothing was heard for a while, so that a lost announcement is repaired
    Announce    blocks that are final; the last one is `final` and says which tokens follow
    Fetch       lease what you have cached of this prefix; answered by Fetched
    Ready       of a running sequence: all that was announced is here, stop it for the rest
    Renew       keeps the bound leases alive while the reader works; answered by Renewed, so that
                a reader notices a silent owner
    Close       after the last read has ended: may I use what I read?
    Closed      HELD: the blocks were held without a break since they were announced. Only this
                answer makes them usable, or the same read in the owner's memory (seals.py), which
                is not waited for as a busy owner is; any other answer, or none, discards them.
    Abort       either side ends the lease early; never answered

Three ways to a lease, one way to its end:

    prefill     opened by its submit, Bind, Announce while chunks end, final with the first token
    running     opened by the router's Offer, Bind, Announce while it decodes, Ready, final; HELD
                commits the move, anything else lets it run on at its owner
    cached      Fetch, Fetched: everything is final at once
"""

from dataclasses import dataclass
from enum import IntEnum

from core.ids import BlockHash, BlockId, Incarnation, LeaseId, ModelId, SequenceId, WorkerId
from core.kv import KvLayout
from core.messages import PROTOCOL_MAJOR, PROTOCOL_MINOR


class LeaseOutcome(IntEnum):
    """How a lease ended. WITHDRAWN: nothing was computed, and another worker does it instead."""

    UNKNOWN = 0
    HELD = 1
    EXPIRED = 2
    ABORTED = 3
    WITHDRAWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """`word` is in `slot` of the owner's seals as long as a finished lease holds its blocks."""

    slot: int
    word: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Where an arena can be read: transport name, its metadata, base address and size; and its
    owner's seals, `seal_slots` of 8 bytes in host memory, 0 where they are not read this way.
    """

    transport: str
    metadata: bytes
    address: int
    nbytes: int
    device: str
    seal_address: int = 0
    seal_slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The arena of one tensor-parallel rank: its layout, and the ways to read it, best first."""

    layout: KvLayout
    memories: tuple[Memory, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHello:
    """Who speaks. `model_id` must be equal on both sides; `shards` has one entry per rank."""

    worker_id: WorkerId
    incarnation: Incarnation
    model_id: ModelId
    shards: tuple[Shard, ...]
    protocol_major: int = PROTOCOL_MAJOR
    protocol_minor: int = PROTOCOL_MINOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    lease_id: LeaseId
    sequence_id: SequenceId
    first_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """`block_ids[i]` holds block `first_index + i` of the sequence, in the owner's arena.

    The final one names the tokens after those that the reader's submit had: of a prefill the one
    it sampled, of a running sequence all it has generated. `ended`: nothing follows them.
    `seal` is whole until the lease ends; a running sequence has none, as HELD commits its move.
    """

    lease_id: LeaseId
    sequence_id: SequenceId
    first_index: int
    block_ids: tuple[BlockId, ...]
    final: bool = False
    tokens: tuple[int, ...] = ()
    ended: bool = False
    seal: Seal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """`hashes` are those of a whole prefix; the reader has the first `first_index` blocks."""

    number: int
    sequence_id: SequenceId
    hashes: tuple[BlockHash, ...]
    first_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """`block_ids[i]` holds block `first_index + i`; none: nothing is leased."""

    number: int
    lease_id: LeaseId
    block_ids: tuple[BlockId, ...]
    seal: Seal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class Renew:
    lease_ids: tuple[LeaseId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Renewed:
    """The owner lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """`verify` names blocks by owner's id whose checksums the answer shall carry."""

    lease_id: LeaseId
    verify: tuple[BlockId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """`checksums` belong to the `verify` of the question, in order: of each block one for each KV
    head that the owner holds, ascending.
    """

    lease_id: LeaseId
    outcome: LeaseOutcome
    checksums: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    lease_id: LeaseId
    reason: str
    outcome: LeaseOutcome = LeaseOutcome.ABORTED


FromReader = PeerHello | Bind | Fetch | Ready | Renew | Close | Abort
FromOwner = PeerHello | Refused | Announce | Fetched | Renewed | Closed | Abort
