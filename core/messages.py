"""What a router and a worker say to each other over the RouterStream, as typed values.

One bidirectional stream per router-worker pair carries all sequences. A submit opens a *leg*, named
by its `number`: counted up by the router per stream, so the worker's report "last submit seen: 41"
tells which submits its load already holds, and token frames need no long ids.

    router -> worker   PrefillSubmit | DecodeSubmit | Offer | Cancel | Withdraw | RenewLeases
                       | SnapshotRequest
    worker -> router   WorkerHello (first) or RouterRefused (only)
                       | Accepted | Rejected | TokenFrame | LegFailed | Offered | Moved
                       | Withdrawn | LoadReport | KvEvents | KvSnapshot

Of a leg the worker says Accepted or Rejected once, then TokenFrame entries, of which the last has a
finish; or LegFailed, Moved or Withdrawn, after which it says nothing more of it. A stream that ends
ends all its legs.
Durations travel, never absolute times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from core.ids import BlockHash, Incarnation, LeaseId, ModelId, Role, SequenceId, WorkerId
from core.kv import KvLayout
from core.sampling import FinishReason, SamplingParams
from core.stages import Stage
from core.step import NO_WORK, STEP_TOKENS, StepWork

PROTOCOL_MAJOR = 2
PROTOCOL_MINOR = 0

HEARTBEAT_S = 1.0
"""A worker that is well says something on every RouterStream at least this often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """Where a decode leg finds its KV: a lease on another worker, and that worker's door.

    `live`: the sequence runs there and goes on running until this leg has all but its last blocks.
    """

    owner_id: WorkerId
    owner_address: str
    owner_incarnation: Incarnation
    lease_id: LeaseId
    live: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSource:
    """A worker believed to hold the first `num_blocks` blocks of a prompt. A hint."""

    worker_id: WorkerId
    address: str
    incarnation: Incarnation
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillSubmit:
    """Run `tokens` (prompt, plus the output so far of an earlier attempt), sample one token.

    `output_position` is the absolute output position of that token. `cache_salt` separates
    tenants' prefix caches. `source` may hold more of the prompt than this worker does.
    """

    number: int
    sequence_id: SequenceId
    tokens: Sequence[int]
    output_position: int
    sampling: SamplingParams
    deadline_s: float
    cache_salt: str = ""
    source: PrefixSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSubmit:
    """Continue after `tokens`. Their KV comes from `handoff`, or is computed here when None.

    With a hand-off the owner samples the token at `output_position` (a running sequence: all up to
    its stop) and passes it on with its last announcement; this worker's frames begin with the one
    after it.
    """

    number: int
    sequence_id: SequenceId
    tokens: Sequence[int]
    output_position: int
    sampling: SamplingParams
    deadline_s: float
    handoff: Handoff | None
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Open a lease on the KV of a running decode leg, for another decode worker to take over."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop a leg. The worker frees what it holds and says nothing more of it."""

    number: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw:
    """Stop a prefill leg if nothing was computed for it yet; Withdrawn says so. One that has begun
    goes on, without an answer.
    """

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewLeases:
    """Keep leases alive that no reader is bound to yet."""

    lease_ids: tuple[LeaseId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotRequest:
    """A gap was seen in the KV events: send all that is held, numbered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    """Who answers. `epoch` counts role changes of one incarnation."""

    worker_id: WorkerId
    incarnation: Incarnation
    role: Role
    epoch: int
    model_id: ModelId
    layout: KvLayout
    num_blocks: int
    context_tokens: int
    peer_address: str
    network_domain: str = ""
    """Empty: the host of `peer_address`."""
    step_tokens: int = STEP_TOKENS
    """Of a step, at most."""
    chunk_tokens: int = STEP_TOKENS
    """Of one prompt in a step, at most."""
    device: str = ""
    """What computes its steps, by its maker's name; empty where that is not told."""
    protocol_major: int = PROTOCOL_MAJOR
    protocol_minor: int = PROTOCOL_MINOR


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRefused:
    """This router is not served, and why; the stream ends."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The worker took the leg. A prefill names its lease and how long that lives unrenewed."""

    number: int
    lease_id: LeaseId | None = None
    lease_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """The worker's true state does not allow the leg; nothing is held for it."""

    number: int
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """Answer to Offer. `lease_id` None: the leg cannot move now, `message` says why."""

    number: int
    lease_id: LeaseId | None
    lease_s: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The reader of an offered leg has taken it over; its last token here was sent before this."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdrawn:
    """Answer to Withdraw: the leg has not begun and never will; nothing is held for it."""

    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LegTimes:
    """Where a leg's time went, sent with its first token. Seconds, counts of this leg only."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    work: StepWork = NO_WORK
    """Of all prompts in the steps that took `prefill_s`; no steps: not told."""
    transfer_s: float = 0.0
    transfer_bytes: int = 0
    transfer_blocks: int = 0
    transfer_descriptors: int = 0
    transfer_hidden_s: float = 0.0
    """Part of `transfer_s` that passed before the owner's last announcement."""
    cached_tokens: int = 0
    fetched_tokens: int = 0
    """Of `cached_tokens`, those pulled for this leg from another worker's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LegTokens:
    """New tokens of one leg. `logits` is fp32 little endian, one row of vocab_size per token."""

    number: int
    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    times: LegTimes | None = None
    logits: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFrame:
    """One engine step's tokens for one router."""

    entries: tuple[LegTokens, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LegFailed:
    """The leg ended without an answer; `code` is one of core.errors."""

    number: int
    code: str
    message: str
    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """True load, sent after every change that matters, and at least every HEARTBEAT_S.

    A router's view is this plus its own submits with a number above `last_submit`.
    """

    last_submit: int
    queued_tokens: int
    """Uncached prompt tokens accepted and not yet prefilled."""
    waiting: int
    running: int
    context_tokens: int
    """Tokens of context of all running sequences."""
    decoding: int = 0
    """Of those that run, those of which one token is to be fed, as of all that decode."""
    decoding_tokens: int = 0
    """The context of those."""
    free_blocks: int
    """Blocks free or evictable now."""
    total_blocks: int
    draining: bool = False
    step_age_s: float = field(default=0.0, compare=False)
    """How long the engine's step in flight has run; 0: none is. It grows by itself, so that alone
    is no change."""
    longest_step_s: float = 0.0
    """Of its last steps, but for one outlier; 0: it is cold, or does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStored:
    """Blocks now held, as a chain below `parent` (a held block or a root)."""

    parent: BlockHash
    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvRemoved:
    """Blocks no longer held; leaf first, so holdings stay closed under prefix."""

    hashes: tuple[BlockHash, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvents:
    """A run of events; `first_number` is the first one's, counted up per incarnation."""

    first_number: int
    events: tuple[KvStored | KvRemoved, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSnapshot:
    """A chunk of all that is held; events from `next_number` on come after it."""

    next_number: int
    hashes: tuple[BlockHash, ...] = ()
    last: bool = True


RouterToWorker = (
    PrefillSubmit | DecodeSubmit | Offer | Cancel | Withdraw | RenewLeases | SnapshotRequest
)
WorkerToRouter = (
    WorkerHello
    | RouterRefused
    | Accepted
    | Rejected
    | TokenFrame
    | LegFailed
    | Offered
    | Moved
    | Withdrawn
    | LoadReport
    | KvEvents
    | KvSnapshot
)
