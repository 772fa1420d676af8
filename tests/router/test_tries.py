"""How often one sequence is tried."""

import pytest

from core.errors import NoWorkers, Overloaded, TransferFailed, Unavailable, WorkerFailed, WorkerLost
from core.ids import WorkerId
from router.tries import Tries
from router.types import PromptRefused

LOST = WorkerLost("gone")


def follow(*ends: tuple[Unavailable, int], most: int = 3) -> list[bool]:
    """Of attempts that gave so many tokens and then failed like that: what may follow each."""
    tries = Tries(most)
    return [tries.may_follow(error, given) for error, given in ends]


@pytest.mark.parametrize("error", [LOST, TransferFailed("no KV"), NoWorkers("none")])
def test_attempts_without_progress_are_counted(error: Unavailable) -> None:
    assert follow(*[(error, 0)] * 3) == [True, True, False]


def test_an_attempt_that_gave_tokens_of_the_answer_starts_the_row_anew() -> None:
    assert follow((LOST, 0), (LOST, 0), (LOST, 5), (LOST, 0), (LOST, 0))[2:] == [True, True, False]


def test_the_token_of_the_prefill_alone_is_no_progress() -> None:
    assert follow(*[(LOST, 1)] * 3) == [True, True, False]


def test_a_sequence_that_kills_worker_after_worker_in_mid_answer_is_stopped() -> None:
    assert follow(*[(LOST, 5)] * 9) == [*[True] * 8, False]


def test_waiting_for_room_counts_only_where_nothing_has_begun() -> None:
    full = Overloaded("full")
    assert follow(*[(full, 0)] * 3) == [True, True, False]
    assert all(follow((LOST, 0), *[(full, 0)] * 20))
    assert all(follow((LOST, 2), *[(full, 0)] * 20))


def test_what_two_workers_fail_at_is_taken_for_the_sequences_fault() -> None:
    a, b = (WorkerFailed("no logits", worker_id=name) for name in "ab")
    assert follow((a, 0), (LOST, 0), (b, 0), most=9) == [True, True, False]
    assert follow((a, 5), (b, 5), most=9) == [True, False]


def test_one_worker_that_fails_twice_is_tried_to_the_end() -> None:
    fault = WorkerFailed("no logits", worker_id="a")
    assert follow(*[(fault, 0)] * 3) == [True, True, False]


def test_pauses_grow_until_there_is_progress() -> None:
    tries = Tries(99)
    pauses = [tries.pause_s() for _ in range(40)]
    assert pauses[:3] == [0.0, 0.05, 0.1]
    assert max(pauses) == 1.0
    tries.may_follow(LOST, 5)
    assert tries.pause_s() == 0.0


def test_a_refused_prompt_pauses_at_once() -> None:
    tries = Tries(3)
    tries.may_follow(PromptRefused("full", WorkerId("p")), 0)
    assert tries.pause_s() == 0.05
