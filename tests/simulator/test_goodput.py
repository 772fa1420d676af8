"""The search for the highest rate, on queues whose capacity is known."""

from dataclasses import replace
from pathlib import Path

import pytest

from core.errors import InvalidRequest
from engine.config import EngineConfig, TimedConfig
from router.config import RouterConfig
from router.policies.base import Slo
from simulator import goodput
from simulator.build import Settings
from simulator.config import SimulationConfig
from simulator.goodput import (
    SYSTEMS,
    Found,
    Point,
    Question,
    System,
    choose_systems,
    compare,
    rank,
    search,
    settings_of,
)
from simulator.workload.build import Shaping
from simulator.workload.load import Loaded, load_workload

TIMED = TimedConfig(prefill_base_ms=0, prefill_per_token_ms=1.0, prefill_per_token2_ms=0)
SETTINGS = Settings(
    simulation=SimulationConfig(kv_tokens=40_960),
    engine=EngineConfig(kind="timed", timed=TIMED),
    router=RouterConfig(admission="off"),
    slo=Slo(ttft_s=2.0, tpot_s=0.1),
    prefill_workers=1,
    decode_workers=1,
    max_queued_tokens=1_000_000,
    max_sequences=1024,
)
QUESTION = Question(trace="poisson:rate=1,prompt=500,output=5", requests=200, refine=4)
BATON, COLOCATED = SYSTEMS["baton"], SYSTEMS["colocated-least-load"]


def test_the_rate_found_is_the_highest_that_keeps_the_share() -> None:
    found = search(BATON, SETTINGS, QUESTION, seed=0)
    kept = [p for p in found.points if p.attainment >= 0.9]
    missed = [p for p in found.points if p.attainment < 0.9]
    best = max(p.rate_per_gpu_s for p in kept)
    assert found.rate_per_gpu_s == best
    # A prompt takes half a second: more than two per second no prefill worker (of 2 GPUs) can do.
    assert 0.4 < found.rate_per_gpu_s < 1.1
    assert min(p.scale for p in missed) / max(p.scale for p in kept) < 1.1


@pytest.mark.parametrize(
    ("tpot_s", "peer"), [(1.0, SYSTEMS["mooncake"]), (0.1, SYSTEMS["colocated-least-load"])]
)
def test_where_chunks_may_join_decodes_it_beats_a_fixed_split_and_elsewhere_shared_workers(
    tpot_s: float, peer: System
) -> None:
    settings = replace(SETTINGS, slo=Slo(ttft_s=2.0, tpot_s=tpot_s))
    question = replace(QUESTION, requests=120, refine=2)
    standings = compare([BATON, peer], settings, question, range(2))
    assert [standing.system for standing in standings] == ["baton", peer.name]
    assert standings[0].behind.mean == 0
    assert standings[1].behind.mean > 0.1


def test_one_process_and_two_give_the_same_result() -> None:
    question = replace(QUESTION, requests=50, refine=0)
    one = compare([COLOCATED], SETTINGS, question, range(2), processes=1)
    assert compare([COLOCATED], SETTINGS, question, range(2), processes=2) == one


def test_a_target_nobody_can_keep_has_no_goodput() -> None:
    hopeless = replace(SETTINGS, slo=Slo(ttft_s=0.01, tpot_s=0.1))
    found = search(BATON, hopeless, replace(QUESTION, requests=60), seed=0)
    assert found.rate_per_gpu_s == 0


def test_a_system_keeps_all_gpus_and_changes_its_keys_alone() -> None:
    changed = settings_of(SYSTEMS["colocated-prefix"], SETTINGS)
    assert sum(pool.workers for pool in changed.simulation.pools) == 2
    assert {pool.role for pool in changed.simulation.pools} == {"colocated"}
    assert changed.engine.chunk_tokens == SETTINGS.engine.step_tokens > 512, "as its peers do"
    assert changed.router.prefill_policy == "prefix_affinity"
    assert settings_of(BATON, SETTINGS) == SETTINGS


def test_an_unknown_system_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"vllm.*mooncake"):
        choose_systems(["vllm"])


def test_a_trace_is_read_once_for_all_rates_of_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def load(trace: str, shaping: Shaping) -> Loaded:
        reads.append(shaping.seed)
        return load_workload(trace, shaping)

    monkeypatch.setattr(goodput, "load_workload", load)
    question = replace(QUESTION, requests=61, refine=1)
    found = search(BATON, SETTINGS, question, seed=5)
    search(COLOCATED, SETTINGS, question, seed=5)
    assert len(found.points) > 2
    assert reads == [5]


def test_each_seed_is_asked_another_part_of_a_trace(tmp_path: Path) -> None:
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:17:{i:02}.0000000,{100 + i},5" for i in range(10)]
    file = tmp_path / "azure.csv"
    file.write_text("\n".join(lines) + "\n")
    question = replace(QUESTION, trace=str(file), requests=4)
    parts = [
        [request.prompt_tokens - 100 for request in goodput._asked(question, seed, 2.0).requests]
        for seed in range(3)
    ]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize("scale", [0.3, 1.0, 7.0])
def test_requests_stretched_to_a_rate_are_those_the_trace_gives_at_it(scale: float) -> None:
    stretched = goodput._asked(QUESTION, 2, scale)
    shaping = Shaping(seed=2, rate_scale=scale, requests=QUESTION.requests)
    built = load_workload(QUESTION.trace, shaping).workload
    assert [r.at_s for r in stretched.requests] == pytest.approx([r.at_s for r in built.requests])
    assert [r.prompt_tokens for r in stretched.requests] == [
        r.prompt_tokens for r in built.requests
    ]


def test_a_system_that_keeps_the_share_at_the_last_rate_tried_serves_at_least_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        goodput, "run_once", lambda settings, question, seed, scale: Point(scale, scale, 1.0)
    )
    found = search(BATON, SETTINGS, QUESTION, seed=0)
    assert found.at_least
    assert found.rate_per_gpu_s == max(point.rate_per_gpu_s for point in found.points)
    assert len({point.scale for point in found.points}) == 10
    assert rank([found])[0].at_least


def test_one_seed_ties_nobody_but_the_best() -> None:
    best, other = rank([Found("a", 0, 2.0, ()), Found("b", 0, 1.0, ())])
    assert (best.is_tied, other.is_tied) == (True, False)


def test_of_closed_sessions_the_highest_rate_counts_not_the_most_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beyond some number, more sessions that keep the share are served slower."""

    def crowded(settings: Settings, question: Question, seed: int, scale: float) -> Point:
        return Point(scale, min(scale, 20 - scale), 0.95 if scale < 17 else 0.5)

    monkeypatch.setattr(goodput, "run_once", crowded)
    question = Question(trace="", requests=1, first_scale=1.0, growth=2.0, refine=3)
    found = search(BATON, SETTINGS, question, 0)
    assert max(p.scale for p in found.points if p.attainment >= question.share) == 16.0
    assert found.rate_per_gpu_s == 8.0
