"""The seam between the HTTP edge and flow.py."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from core.errors import Cancelled, Overloaded
from core.ids import Incarnation, RequestId, Role, WorkerId
from core.sampling import FinishReason, SamplingParams
from router.local import LocalVerdict


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One choice of one request, tokenized. `deadline_s` is what is left of its time."""

    request_id: RequestId
    choice: int
    prompt_tokens: Sequence[int]
    sampling: SamplingParams
    deadline_s: float
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where one sequence's time went, as the router and its last legs saw it."""

    prefill_worker: str = ""
    decode_worker: str = ""
    attempts: int = 1
    queue_s: float = 0.0
    prefill_s: float = 0.0
    ttft_s: float = 0.0
    transfer_s: float = 0.0
    transfer_bytes: int = 0
    transfer_blocks: int = 0
    transfer_descriptors: int = 0
    transfer_hidden_s: float = 0.0
    """Part of `transfer_s` that passed while the prefill still ran."""
    decode_s: float = 0.0
    tpot_s: float = 0.0
    cached_tokens: int = 0
    fetched_tokens: int = 0
    """Of `cached_tokens`, those the prefill worker pulled from another worker's cache."""
    fetched_bytes: int = 0
    """KV bytes read for them."""
    migrations: int = 0
    """Moves to another decode worker while running."""

    @property
    def transfer_overlap(self) -> float:
        """Share of the transfer's time that was hidden behind the prefill."""
        return self.transfer_hidden_s / self.transfer_s if self.transfer_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """New tokens of a sequence. The last one has `finish` and `timings`.

    `logits`, fp32 little endian rows, only if the sampling asked for them.
    """

    tokens: tuple[int, ...]
    finish: FinishReason | None = None
    cached_tokens: int = 0
    timings: Timings | None = None
    logits: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationReport:
    """How the live migration of one running sequence went."""

    moved: bool
    """The destination has it. False: it runs on at the source, unless the request has ended."""
    reason: str
    """Why it did not move, or was lost just after; empty when all went well."""
    source: WorkerId
    destination: WorkerId
    pause_s: float
    """Between the last token from the source and the first one from the destination, here."""
    total_s: float
    """From the offer to the destination's first token, or to the end of the migration."""
    tokens_meanwhile: int
    """Tokens that reached the client during the copy."""
    transfer_bytes: int
    transfer_blocks: int
    transfer_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingLimits:
    """What the connected workers can hold now."""

    context_tokens: int
    """Longest prompt plus answer: the model's context or the smallest arena, whichever is less."""
    ready: bool
    """A prefill and a decode worker are routable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One line of a status table."""

    worker_id: str
    role: str
    address: str
    connected: bool
    reason: str = ""
    """Why it is not connected: refused, by it or by this router, or not reached."""
    draining: bool = False
    ejected: bool = False
    """Left out of placement by this router, as it failed or was slow, and probed from time to time;
    or as its engine hangs."""
    ejected_for: str = ""
    """failures, slow or hung; empty while it is not ejected."""
    waiting: int = 0
    running: int = 0
    queued_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0


class TokenSink(Protocol):
    """Takes one sequence's tokens in order, on the event loop, as the worker's frame is read.

    Neither call waits. What one raises ends the sequence with that error; a sink that has had
    enough raises Enough.
    """

    def token(self, token: int) -> None:
        """One more token of a running answer, and nothing else to say: nearly all calls."""
        ...

    def take(self, item: Generated) -> None:
        """Anything else: the first item, several tokens, the last one."""
        ...


class Enough(Cancelled):
    """The sink needs no more tokens: a stop string matched."""

    code = "enough"


class PromptRefused(Overloaded):
    """A prefill worker is full, and nothing of this attempt has begun anywhere."""

    def __init__(self, message: str, worker_id: WorkerId) -> None:
        super().__init__(message)
        self.worker_id = worker_id


@dataclass(frozen=True, slots=True)
class Shut:
    """Workers that a sequence does not go to again while there are others."""

    failed: set[Incarnation] = field(default_factory=set)
    full: set[Incarnation] = field(default_factory=set)
    """They had no room, and nothing else: a prefix may be read from them."""

    @property
    def all(self) -> set[Incarnation]:
        return self.failed | self.full


class Requeued(Cancelled):
    """An attempt's prefill had not begun and is to begin at `to` instead; no failure."""

    code = "requeued"

    def __init__(self, to: WorkerId) -> None:
        super().__init__(f"the prompt moves to {to}")
        self.to = to


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteCandidate:
    """A worker that was looked at, its cost (lower is better) and what that is made of."""

    worker_id: WorkerId
    cost: float
    terms: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteChoice:
    """Where one leg of a request would go now, and why; `line` says it all in one line."""

    leg: Role
    worker_id: WorkerId
    rule: str
    candidates: tuple[RouteCandidate, ...]
    line: str
    local: LocalVerdict = LocalVerdict.OFF
    """LOCAL or STAYS: one worker serves the prompt alone, so both legs are one; or why not."""


class RouteExplainer(Protocol):
    """What the debug route needs of flow.py."""

    def explain_route(self, request: GenerateRequest) -> tuple[RouteChoice, ...]:
        """The choices for such a request, which is not run. Raises NoWorkers."""
        ...


class Generator(Protocol):
    """What the HTTP edge needs of flow.py.

    `run` gives the sink at least one item, the last one with a finish, and then returns; or it
    raises a BatonError. Cancelling it cancels every leg at once. `migrate` moves a sequence that
    runs to another decode worker, `to` or any; it raises InvalidRequest or NoWorkers when that
    cannot even be tried.
    """

    async def run(self, request: GenerateRequest, sink: TokenSink) -> None: ...

    async def migrate(
        self, request_id: RequestId, choice: int, to: WorkerId | None, timeout_s: float
    ) -> MigrationReport: ...

    def limits(self) -> ServingLimits: ...

    def workers(self) -> tuple[WorkerStatus, ...]: ...
