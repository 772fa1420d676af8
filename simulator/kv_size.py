"""How much KV a simulated worker holds, and how large it is.

The config says so, else the profile or its model; else it is assumed, and that is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import EngineConfig
from engine.latency.shapes import find_shape, published_shape
from simulator.config import SimulatedPool, SimulationConfig
from simulator.profiles.types import Profile
from simulator.workload.types import SimRequest

_TOKENS = 400_000
_BYTES_PER_TOKEN = 131_072
"""Llama-3-8B's, the model that engine.timed is of unless it is told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSize:
    """`notes` are for the reader of a result: what is assumed, and what says otherwise."""

    tokens: int
    bytes_per_token: int
    notes: tuple[str, ...]
    is_asked: bool
    """The config says how many tokens."""


def kv_size(pool: SimulatedPool, sim: SimulationConfig, loaded: Profile | None) -> KvSize:
    """Of each worker of the pool. Raises ConfigError for a model that is not known."""
    notes = list[str]()
    asked = pool.kv_tokens or sim.kv_tokens
    tokens = asked or (loaded and loaded.kv_tokens)
    nbytes = sim.kv_bytes_per_token or _model_bytes(sim, loaded)
    if tokens is None and loaded is not None:
        notes.append(
            f"{loaded.name} does not say how much KV a worker has room for: {_TOKENS:,} tokens are"
            " assumed; set simulation.kv_tokens"
        )
    is_read = any(each.role != "colocated" for each in (pool, *sim.pools))
    if nbytes is None and loaded is not None and is_read:
        notes.append(
            f"{loaded.name} is of no model of a known shape: {_BYTES_PER_TOKEN:,} bytes of KV per"
            " token are assumed, as of Llama-3-8B; set simulation.kv_bytes_per_token, or"
            " simulation.model to its checkpoint folder"
        )
    return KvSize(
        tokens=tokens or _TOKENS,
        bytes_per_token=nbytes or _BYTES_PER_TOKEN,
        notes=tuple(notes),
        is_asked=asked is not None,
    )


def _model_bytes(sim: SimulationConfig, loaded: Profile | None) -> int | None:
    if sim.model is not None:
        return int(find_shape(sim.model).kv_bytes_per_token)
    shape = published_shape(loaded.model) if loaded is not None and loaded.model else None
    return int(shape.kv_bytes_per_token) if shape is not None else None


def unread_notes(
    engine: EngineConfig, pools: Sequence[KvSize], requests: Sequence[SimRequest]
) -> list[str]:
    """Settings of live engines that a simulation has no use for, where it matters."""
    notes = list[str]()
    held = sorted({pool.tokens for pool in pools if not pool.is_asked})
    if held and "kv_memory_mb" in engine.model_fields_set:
        notes.append(
            "engine.kv_memory_mb is of live workers; a simulated one holds"
            f" {' or '.join(f'{tokens:,}' for tokens in held)} tokens of KV, unless"
            " simulation.kv_tokens says otherwise"
        )
    limit = engine.timed.context_tokens
    longer = sum(each.prompt_tokens + each.output_tokens > limit for each in requests)
    if engine.kind == "timed" and longer:
        notes.append(
            f"{longer} requests are longer than engine.timed.context_tokens, {limit:,}: a live"
            " cluster refuses or cuts them, a simulated one serves them"
        )
    return notes
