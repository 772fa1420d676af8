"""Settings of the router."""

from typing import Literal

from pydantic import Field

from core.config import Settings

PrefillPolicyName = Literal[
    "baton",
    "round_robin",
    "random",
    "least_load",
    "power_of_two",
    "prefix_affinity",
    "dynamo_cost",
    "mooncake_ttft",
    "dualmap",
    "preble",
]
DecodePolicyName = Literal["baton", "round_robin", "random", "least_load", "power_of_two"]
DecodeAdmission = Literal["off", "current", "predicted"]


class RouterConfig(Settings):
    """HTTP edge, deadlines and bounds."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 takes a free port."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer tokens; empty accepts every caller."""
    request_timeout_s: float = Field(600.0, gt=0)
    """Every request ends by then, or a second later, whatever happens."""
    max_connections: int = Field(16_384, ge=1)
    """Connections of clients at once; one beyond that is answered 503 with Retry-After and closed,
    unless it asks for /health, /metrics or /control/workers. Fewer where the process may not open
    that many files (`ulimit -n`)."""
    max_body_bytes: int = Field(8 * 1024 * 1024, gt=0)
    max_bodies_mb: int = Field(256, ge=1)
    """Bodies being received or parsed at once, in all, not counting the first 64 KiB of each; what
    is beyond is answered 429."""
    head_timeout_s: float = Field(15.0, gt=0)
    """From the first byte of a request to the end of its headers; then the connection is closed."""
    upload_timeout_s: float = Field(60.0, gt=0)
    """From the end of a request's headers to the end of its body."""
    stream_buffer_events: int = Field(1024, ge=16)
    """Events that may wait for a client that reads too slowly."""
    slow_client_grace_s: float = Field(1.0, gt=0)
    """A client with that many waiting has so long to take them, then its request is cancelled."""
    tokenizer_threads: int = Field(2, ge=1)
    worker_silence_s: float = Field(5.0, gt=2.0)
    """A worker that says nothing for so long is lost; it sends a heartbeat every second."""
    hung_step_s: float = Field(10.0, ge=0)
    """A worker whose engine is in one step for longer, and for 20 times what the longest steps of
    its kind took, hangs: its sequences continue elsewhere, and nothing goes there until the step
    ends. 0: it keeps them until engine.step_timeout_s. See router/hung.py."""
    worker_wait_s: float = Field(15.0, ge=0)
    """A request waits for so long, in all, while a pool has no routable worker: a restart. That
    counts as no load."""
    max_attempts: int = Field(3, ge=1)
    """Placements tried in a row for one sequence, none of which brings its answer forward, before
    its error reaches the client."""
    max_forwards: int = Field(64, ge=1)
    """Full prefill workers that a prompt is offered to in a row, which is one attempt; after a
    pause the others are asked. Each costs the router about a placement. Workers that keep no queue
    (prefill.max_queued_tokens) want all of them asked, however many there are."""
    prefill_policy: PrefillPolicyName = "baton"
    """How a prefill worker is chosen; the others are for comparison. See router/policies/."""
    decode_policy: DecodePolicyName = "baton"
    """How a decode worker is chosen."""
    prefill_queue_weight: float = Field(0.05, ge=0)
    """Least weight of queued work against own uncached work in baton's prefill cost; it weighs as
    much as the share of workers that are idle."""
    requeue: bool = True
    """A prompt queued at a prefill worker that has fallen behind slo.ttft_ms moves, before it has
    begun, to another worker that was considered for it and is idle."""
    admission: Literal["slo", "off"] = "slo"
    """slo: a request whose slo.ttft_ms no worker can keep because of what waits before it is held
    in the router for a while, or answered 429 with Retry-After at once; off: placed anyhow."""
    admission_max_requests: int = Field(256, ge=0)
    """Requests held like that, or because a pool has no worker (also with admission: off); further
    ones are answered 429, and those that cannot be in time anyway from half of it on. One of
    several choices (n) counts once."""
    admission_max_tokens: int = Field(2_000_000, ge=0)
    """Prompt tokens of the requests held; likewise."""
    admission_decode: DecodeAdmission = "off"
    """With admission: slo, a request is answered 429 as well when no decode worker could keep
    slo.tpot_ms for it, or has the memory; current: were it to come there now; predicted: when its
    prefill will be done. See router/decode_load.py."""
    local_prefill: bool = True
    """A prompt is computed at a decode worker, without a hand-off, when that is sooner and the
    answers running there keep slo.tpot_ms."""
    local_decode: bool = True
    """An answer stays at the prefill worker chosen for its prompt, without a hand-off, when nine
    tenths of the prompt are cached there and it has less to run than decode workers. It does
    nothing without local_prefill."""
    local_step_share: float = Field(0.95, ge=0)
    """Of slo.tpot_ms, what a step should take that computes part of a prompt beside answers: it
    takes as many of the prompt's tokens as fit, but at least 64. 0: as many as engine.step_tokens
    allows. It bounds nothing without local_prefill."""
    eject_after_failures: int = Field(5, ge=0)
    """Legs in a row that fail on a worker before it is left out of placement for a while; one that
    is far slower than its peers is left out as well. 0 leaves out none."""
    eject_s: float = Field(5.0, gt=0)
    """How long, the first time; each time shortly after takes twice as long."""
    debug_routes: bool = False
    """Serve POST /debug/route: where a request would go now and why, without running it."""
    index_max_mb: int = Field(1024, ge=1)
    """Bound of the prefix index: about 5 million blocks, with few workers. When it is full, newly
    cached blocks are not known to the router until workers have evicted others."""

    def step_s(self, tpot_s: float) -> float | None:
        """What such a step should take at most, with that target; None: no bound."""
        return self.local_step_share * tpot_s or None if self.local_prefill else None
