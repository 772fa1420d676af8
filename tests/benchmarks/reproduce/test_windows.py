"""Windows of a trace: each seed has its own, at any rate."""

import json
from pathlib import Path

import pytest

from benchmarks.reproduce.windows import at_load, at_rate, prompts_alone, window_of
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve

SECOND_PER_THOUSAND = FittedLatency(
    prefill=PrefillCurve(per_token_s=1e-3), decode=(DecodeCurve(base_s=1.0),)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    lines = [
        {"timestamp": 1000 * i, "input_length": 1024, "output_length": 5, "hash_ids": [i, 100 + i]}
        for i in range(10)
    ]
    file = tmp_path / "mooncake_small.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_seeds_have_windows_that_follow_each_other_and_begin_at_zero(trace: Path) -> None:
    first, second = (window_of(trace, seed, 5) for seed in (0, 1))
    assert first[0].at_s == second[0].at_s == 0
    assert not {r.hashes for r in first} & {r.hashes for r in second}
    assert [r.hashes for r in window_of(trace, 2, 5)] == [r.hashes for r in first]


def test_without_a_file_prompts_are_drawn_by_seed() -> None:
    assert window_of(None, 0, 20) == window_of(None, 0, 20) != window_of(None, 1, 20)


def test_prompts_alone_differ_in_the_answer_only(trace: Path) -> None:
    requests = window_of(trace, 0, 4)
    alone = prompts_alone(requests)
    assert {r.output_tokens for r in alone} == {1}
    assert [r.hashes for r in alone] == [r.hashes for r in requests]


def test_at_a_load_the_work_is_that_share_of_what_workers_can_do_meanwhile(trace: Path) -> None:
    requests = at_load(window_of(trace, 0, 10), 0.5, 4, SECOND_PER_THOUSAND)
    assert 10 * 1.024 / (4 * requests[-1].at_s) == pytest.approx(0.5)
    faster = at_rate(requests, 2.0)
    assert faster[-1].at_s == pytest.approx(requests[-1].at_s / 2)
