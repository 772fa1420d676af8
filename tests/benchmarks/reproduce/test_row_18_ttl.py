"""Row 18: how long the policy keeps KV, and what that does under pressure and without."""

import json
from pathlib import Path

import pytest

from benchmarks.reproduce.row_18_ttl import (
    CASES,
    TimeToLive,
    UntilNextTurn,
    choose_ttl_s,
    rate,
    sessions_of,
)
from tests.simulator.clusters import ask

PAUSES = [0.5, 1.0, 1.5, 20.0]


@pytest.mark.parametrize(
    ("gain_s", "share", "expected_s"),
    [
        (0.0, 0.1, 0.0),  # nothing is lost by letting go
        (1.0, 0.0, 20.0),  # memory is free
        (1.0, 0.1, 1.5),  # the last quarter of the pauses is too dear
        (0.1, 0.9, 0.0),
    ],
)
def test_the_time_weighs_what_is_saved_against_the_memory_held(
    gain_s: float, share: float, expected_s: float
) -> None:
    assert choose_ttl_s(PAUSES, gain_s, share) == expected_s


def test_without_a_pause_seen_nothing_is_kept() -> None:
    assert TimeToLive(lambda tokens: 1.0, by_session=True).keep_s(ask(), 0.1, 0.0) == 0.0


def test_queues_seen_make_it_keep_longer() -> None:
    patient, hurried = (TimeToLive(lambda tokens: 0.1, by_session=True) for _ in range(2))
    for policy, queue_s in ((patient, 0.0), (hurried, 9.0)):
        for pause_s in PAUSES:
            policy.returned(pause_s)
        kept = [policy.keep_s(ask(), 0.1, queue_s) for _ in range(3)]
        assert kept[-1] == (0.5 if queue_s == 0 else 20.0) or queue_s == 0
    assert hurried.keep_s(ask(), 0.1, 9.0) > patient.keep_s(ask(), 0.1, 0.0)


def test_only_the_last_pauses_are_remembered() -> None:
    policy = TimeToLive(lambda tokens: 100.0, by_session=True)
    for _ in range(600):
        policy.returned(5.0)
    for _ in range(512):
        policy.returned(1.0)
    assert policy.keep_s(ask(), 0.1, 0.0) == 1.0


def test_a_pin_ends_with_its_session() -> None:
    policy = UntilNextTurn({"": 2})
    assert policy.keep_s(ask(), 0.1, 0.0) == float("inf")
    assert policy.keep_s(ask(), 0.1, 0.0) == 0.0


def trace(tmp_path: Path) -> Path:
    """Four sessions of five turns, each turn 640 tokens longer."""
    file = tmp_path / "agents.jsonl"
    rows = [
        {
            "session_id": session,
            "turn": turn,
            "timestamp": 2000 * turn,
            "input_length": 640 * (turn + 1),
            "output_length": 20,
            "hash_ids": [1000 * session + i for i in range(40 * (turn + 1))],
        }
        for session in range(4)
        for turn in range(5)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_pauses_are_drawn_anew_and_sessions_are_whole(tmp_path: Path) -> None:
    block_size, requests = sessions_of(trace(tmp_path), 0, 6)
    assert block_size == 16
    assert len(requests) == 30
    assert all(r.think_s is None or r.think_s > 0 for r in requests)
    assert sessions_of(trace(tmp_path), 0, 6) == (block_size, requests)


def test_with_ample_memory_no_policy_changes_what_is_cached(tmp_path: Path) -> None:
    served = rate(CASES[0], trace(tmp_path), 3.0, seed=0)
    assert len({round(one.hit_share, 6) for one in served.values()}) == 1
