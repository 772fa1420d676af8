"""How much KV a worker holds and how large it is: where it is known, and what is said where not."""

import pytest

from engine.config import EngineConfig, TimedConfig
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from simulator.config import SimulatedPool, SimulationConfig
from simulator.kv_size import kv_size, unread_notes
from simulator.profiles.types import Profile
from simulator.workload.types import SimRequest

POOL = SimulatedPool(name="d", role="decode", workers=1)
LATENCY = FittedLatency(prefill=PrefillCurve(), decode=(DecodeCurve(),))
BARE = Profile(name="m on d", tp=1, latency=LATENCY, model="m")


def profile(model: str, kv_tokens: int | None = None) -> Profile:
    return Profile(name="x", tp=1, latency=LATENCY, model=model, kv_tokens=kv_tokens)


@pytest.mark.parametrize(
    ("model", "nbytes"),
    [
        ("bloom-176b", 2 * 70 * 112 * 128 * 2),
        ("llama2-70b", 327_680),
        ("nvidia/Llama-3.3-70B-Instruct-FP8", 327_680),
    ],
)
def test_kv_has_the_size_of_the_model_that_a_profile_names(model: str, nbytes: int) -> None:
    size = kv_size(POOL, SimulationConfig(), profile(model, 1000))
    assert (size.tokens, size.bytes_per_token, size.notes) == (1000, nbytes, ())


def test_what_a_profile_leaves_open_is_assumed_and_said() -> None:
    room, nbytes = kv_size(POOL, SimulationConfig(), BARE).notes
    assert "m on d does not say how much KV" in room
    assert "simulation.kv_tokens" in room
    assert "131,072 bytes of KV per token are assumed" in nbytes


@pytest.mark.parametrize(
    ("pool", "sim"),
    [
        (POOL, SimulationConfig(kv_tokens=9, kv_bytes_per_token=8)),
        (POOL.model_copy(update={"kv_tokens": 9}), SimulationConfig(model="llama-3-8b")),
        (POOL, SimulationConfig(kv_tokens=9, model="llama-3-8b")),
    ],
)
def test_nothing_is_assumed_of_what_the_config_says(
    pool: SimulatedPool, sim: SimulationConfig
) -> None:
    size = kv_size(pool, sim, BARE)
    assert (size.tokens, size.notes) == (9, ())


def test_colocated_workers_hand_nothing_over_so_the_size_does_not_matter() -> None:
    pool = POOL.model_copy(update={"role": "colocated"})
    assert kv_size(pool, SimulationConfig(kv_tokens=9), BARE).notes == ()


def test_it_matters_beside_workers_that_fetch_from_them() -> None:
    pool = POOL.model_copy(update={"role": "colocated"})
    (note,) = kv_size(pool, SimulationConfig(kv_tokens=9, pools=(pool, POOL)), BARE).notes
    assert "bytes of KV per token are assumed" in note


def test_the_engines_own_model_is_of_the_size_assumed() -> None:
    size = kv_size(POOL, SimulationConfig(), None)
    assert (size.tokens, size.bytes_per_token, size.notes) == (400_000, 131_072, ())


def test_memory_of_live_engines_that_a_config_sets_is_said_to_be_theirs_alone() -> None:
    sizes = [kv_size(POOL, SimulationConfig(), None)]
    assert unread_notes(EngineConfig(), sizes, ()) == []
    (note,) = unread_notes(EngineConfig(kv_memory_mb=512), sizes, ())
    assert "a simulated one holds 400,000 tokens" in note
    asked = [kv_size(POOL, SimulationConfig(kv_tokens=9), None)]
    assert unread_notes(EngineConfig(kv_memory_mb=512), asked, ()) == []


def test_requests_over_the_context_of_the_timed_engine_are_counted() -> None:
    engine = EngineConfig(kind="timed", timed=TimedConfig(context_tokens=100))
    requests = [SimRequest(0.0, prompt, 20) for prompt in (50, 80, 81, 500)]
    (note,) = unread_notes(engine, (), requests)
    assert note.startswith("2 requests are longer than engine.timed.context_tokens, 100")
    assert unread_notes(engine, (), requests[:2]) == []
    assert unread_notes(EngineConfig(), (), requests) == []
