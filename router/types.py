"""The seam between the HTTP edge and flow.py."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from core.ids import RequestId
from core.sampling import FinishReason, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One choice of one request, tokenized. `deadline_s` is what is left of its time."""

    request_id: RequestId
    choice: int
    prompt_tokens: tuple[int, ...]
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
    decode_s: float = 0.0
    tpot_s: float = 0.0
    cached_tokens: int = 0


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
class ServingLimits:
    """What the connected workers can hold now."""

    context_tokens: int
    """Longest prompt plus answer: the model's context or the smallest arena, whichever is less."""
    ready: bool
    """A prefill and a decode worker are routable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """One line of a status table."""

    worker_id: str
    role: str
    address: str
    connected: bool
    draining: bool = False
    waiting: int = 0
    running: int = 0
    queued_tokens: int = 0
    free_blocks: int = 0
    total_blocks: int = 0


class Generator(Protocol):
    """What the HTTP edge needs of flow.py.

    `generate` yields at least once, the last item with a finish, or raises a BatonError. Closing
    the generator early (aclose) cancels every leg at once.
    """

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Generated, None]: ...

    def limits(self) -> ServingLimits: ...

    def workers(self) -> tuple[WorkerView, ...]: ...
