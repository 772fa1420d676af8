"""Row 7: the search for the knee, and windows of a trace."""

import json
from pathlib import Path

import pytest

from benchmarks.reproduce.row_07_dualmap import ENTRANTS, Slice, find, knee, prompts_of


@pytest.mark.parametrize("guess", [0.3, 4.9, 5.0, 40.0])
def test_the_knee_is_found_from_below_and_from_above(guess: float) -> None:
    found = knee(lambda rate: rate <= 5.0, guess)
    assert 5.0 / 1.15**0.26 <= found <= 5.0


def test_windows_are_spread_over_the_trace_and_begin_at_its_start(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 4000 * i, "input_length": 600, "hash_ids": [i, i + 1000]} for i in range(90)
    ]
    file = tmp_path / "mooncake_small.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    piece = Slice(name="small", trace=file, count=10, warm_up=2)
    windows = [prompts_of(piece, seed) for seed in range(5)]
    assert all(window[0].at_s < 4 for window in windows)
    blocks = [{prompt.hashes for prompt in window} for window in windows]
    assert sum(map(len, blocks)) == 50
    assert len(set.union(*blocks)) == 50


@pytest.mark.timeout(60)
def test_what_is_found_keeps_the_share_at_a_rate_above_that_of_no_cache() -> None:
    piece = Slice(name="drawn", trace=None, count=300, warm_up=50)
    entrant = next(e for e in ENTRANTS if e.name == "baton")
    found = find(piece, entrant, seed=0, guess=3.0)
    assert found.rate_rps > 0
    assert 0 < found.hit_share <= found.ideal_share
