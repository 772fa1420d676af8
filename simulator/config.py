"""Settings of the simulated cluster: what a real one has and a config does not tell."""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from core.config import Settings


class SimulatedFailure(Settings):
    """A worker that dies, with all it holds."""

    at_s: float = Field(ge=0)
    pool: str
    worker: int = Field(0, ge=0)
    restart_s: float | None = Field(None, gt=0)
    """Another worker is in its place so long after; unset: none."""
    silent: bool = False
    """No connection ends: routers notice after router.worker_silence_s, owners of what it reads by
    their leases."""


class SimulatedCut(Settings):
    """A worker whose peers are out of reach for a while; routers are not."""

    at_s: float = Field(ge=0)
    pool: str
    worker: int = Field(0, ge=0)
    for_s: float = Field(gt=0)


class SimulatedPool(Settings):
    """Equal workers; what is unset is as for the whole cluster."""

    name: str = Field(min_length=1)
    role: Literal["prefill", "decode", "colocated"]
    """colocated workers compute prompts and answers, as most servers do; they may be all there are,
    or stand beside prefill and decode workers."""
    workers: int = Field(ge=1, le=100_000)
    profile: str | None = None
    tensor_parallel: int | None = Field(None, ge=1)
    kv_tokens: int | None = Field(None, ge=1)
    step_tokens: int | None = Field(None, ge=1)
    chunk_tokens: int | None = Field(None, ge=1)
    nic_gb_per_s: float | None = Field(None, gt=0)
    ready_s: float = Field(0.0, ge=0)
    """Up from then on."""


class SimulationConfig(Settings):
    """Only `baton simulate` and `baton goodput` read this section."""

    profile: str | None = None
    """How long steps take: a profile (see docs/simulation.md); unset: engine.timed's model."""
    model: str | None = None
    """A known model, or a checkpoint folder, for profiles that are of no one model."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one worker."""
    kv_tokens: int | None = Field(None, ge=1)
    """Tokens of KV that one worker holds; unset: what the profile says, or 0.9 of the memory of its
    device leaves beside the weights; else 400,000, and a note says so."""
    kv_bytes_per_token: int | None = Field(None, ge=1)
    """KV of a token on all ranks of a worker; unset: the model's (simulation.model,
    or that of the profile), else Llama-3-8B's 131,072, and a note says so."""
    nic_gb_per_s: float = Field(50.0, gt=0)
    """Each way, of one worker."""
    uplink_gb_per_s: float = Field(400.0, gt=0)
    """Each way, of one network domain."""
    domain_workers: int = Field(0, ge=0)
    """Workers that share a domain; 0: all."""
    handoff_ms: float = Field(1.0, ge=0)
    """From the last byte of a hand-off to its KV being usable."""
    routers: int = Field(1, ge=1)
    report_ms: float = Field(0.0, ge=0)
    """Routers hear of load and caches only so often; 0: they see what is."""
    max_tokens: int = Field(2048, ge=1)
    """What clients ask for at most; no scheduler knows an answer's length before it ends."""
    closed_sessions: bool = False
    """A turn of a session is asked its recorded pause after the answer before it has ended in the
    simulation; false: when it was recorded, whatever is answered when."""
    sessions: int | None = Field(None, ge=1)
    """With closed_sessions, so many at once: the next begins when one is over. Unset: they begin
    at random, at the rate asked for."""
    pools: tuple[SimulatedPool, ...] = ()
    """Unset: a prefill and a decode pool as large as the cluster's."""
    failures: tuple[SimulatedFailure, ...] = ()
    cuts: tuple[SimulatedCut, ...] = ()

    @model_validator(mode="after")
    def _closed_if_counted(self) -> Self:
        if self.sessions is not None and not self.closed_sessions:
            raise PydanticCustomError("open_sessions", "given sessions only with closed_sessions")
        return self
