"""Who is placed, who waits and who is refused."""

from collections.abc import Iterator
from typing import Any, cast

import pytest

from core.ids import WorkerId
from router.admission import (
    Admit,
    Longs,
    Reject,
    Verdict,
    Wait,
    decide,
    decide_decode,
    is_late,
    patience_of,
)
from router.decode_load import DecodeLoad
from router.placement import Considered, Outlook
from router.policies.base import Slo
from router.watcher import RejectReason

SLO = Slo(ttft_s=2.5, tpot_s=0.1)  # two seconds, as what is predicted may take longer


def verdict(
    *outlooks: tuple[float, float], waited_s: float = 0.0, ahead_s: float | None = None
) -> Verdict:
    seen = [Outlook(queue_s, work_s) for queue_s, work_s in outlooks]
    return decide(100.0 + waited_s, 100.0, seen, SLO, ahead_s=ahead_s)


@pytest.mark.parametrize(
    ("work_s", "patience_s"), [(0.0, 2.0), (0.5, 1.5), (1.0, 1.25), (1.5, 1.5), (30.0, 30.0)]
)
def test_patience_is_what_the_target_leaves_or_as_long_as_the_prompt_computes(
    work_s: float, patience_s: float
) -> None:
    assert patience_of(work_s, SLO) == patience_s


def test_a_prompt_that_keeps_its_target_is_admitted() -> None:
    assert verdict((1.5, 0.5)) == Admit()


@pytest.mark.parametrize("work_s", [2.5, 60.0])
def test_a_prompt_that_alone_takes_longer_than_the_target_is_admitted(work_s: float) -> None:
    assert verdict((0.0, work_s)) == Admit()


def test_whoever_cannot_be_in_time_joins_no_queue_but_waits_as_long_as_it_computes() -> None:
    assert verdict((0.5, 30.0)) == Admit()
    assert verdict((0.6, 30.0)) == Wait(recheck_s=29.7, drain_s=1.0)
    assert verdict((20.0, 30.0)) == Wait(recheck_s=20.0, drain_s=19.5)
    assert verdict((0.5, 30.0), waited_s=29.5) == Admit()
    assert isinstance(verdict((0.5, 30.0), waited_s=30.0), Reject)


@pytest.mark.parametrize(
    ("give_way", "queue_s", "placed"),
    [(1.0, 0.6, False), (0.5, 1.0, True), (0.5, 1.1, False), (0.0, 1.6, True), (0.0, 1.7, False)],
)
def test_the_fewer_give_way_the_longer_a_queue_they_join_up_to_their_patience(
    give_way: float, queue_s: float, placed: bool
) -> None:
    seen = [Outlook(queue_s, 1.6)]  # its patience is 1.6 s, too
    said = decide(0.0, 0.0, seen, SLO, give_way=give_way)
    assert isinstance(said, Admit) is placed


def _saw(*long: bool) -> float:
    longs = Longs()
    for is_long in long:
        longs.saw(cast(Considered[Any], _Prompt(2.4 if is_long else 0.1)), SLO)
    return longs.give_way


class _Prompt:
    """As far as `Longs` looks at one."""

    worker_id = WorkerId("p0")

    def __init__(self, work_s: float) -> None:
        self._work_s = work_s

    def outlooks(self) -> Iterator[tuple[WorkerId, Outlook]]:
        yield self.worker_id, Outlook(0.0, self._work_s)


def test_long_prompts_give_way_as_long_as_they_are_few() -> None:
    assert _saw() == 1.0
    assert _saw(True) == 1.0  # the first of all says little
    few, many = [i % 30 == 0 for i in range(600)], [i % 8 == 0 for i in range(600)]
    assert _saw(*few) == 1.0
    assert _saw(*many) == 0.0
    assert _saw(*many, *few) == 1.0
    some = [i % 15 == 0 for i in range(600)]
    assert 0.0 < _saw(*some) < 1.0


def test_what_would_be_late_by_a_little_waits_for_a_shorter_queue() -> None:
    assert verdict((1.0, 1.0)) == Admit()
    assert verdict((1.2, 1.0)) == Wait(recheck_s=0.65, drain_s=1.0)


@pytest.mark.parametrize(("work_s", "late"), [(1.5, False), (1.6, True), (60.0, True)])
def test_a_prompt_is_late_when_its_work_leaves_no_time_to_wait(work_s: float, late: bool) -> None:
    assert is_late(0.0, work_s, SLO) is late


@pytest.mark.parametrize(("waited_s", "late"), [(0.9, False), (1.1, True)])
def test_a_prompt_turns_late_when_it_has_waited_for_what_it_had_to_spare(
    waited_s: float, late: bool
) -> None:
    assert is_late(waited_s, 1.0, SLO) is late


def test_one_worker_that_keeps_the_target_is_enough() -> None:
    assert verdict((50.0, 0.5), (0.5, 0.5)) == Admit()


def test_an_idle_worker_counts_although_a_cache_promises_less_work_elsewhere() -> None:
    assert verdict((50.0, 0.1), (0.0, 30.0)) == Admit()


def test_a_queue_a_little_too_long_is_waited_for() -> None:
    assert verdict((2.0, 0.5)) == Wait(recheck_s=0.5, drain_s=1.0)


def test_a_queue_that_would_have_to_drain_twice_as_fast_is_refused_at_once() -> None:
    assert verdict((3.0, 0.5)) == Reject(retry_after_s=1.5)
    assert verdict((9.0, 0.5), (8.0, 0.5)) == Reject(retry_after_s=6.5)


def test_a_refused_one_is_told_a_second_at_least_and_a_minute_at_most() -> None:
    assert verdict((0.5, 0.5), waited_s=1.4) == Reject(retry_after_s=1.0)
    assert verdict((1000.0, 0.5)) == Reject(retry_after_s=60.0)


def test_waiting_uses_up_the_patience() -> None:
    assert verdict((1.0, 0.5), waited_s=0.6) == Wait(recheck_s=pytest.approx(0.4), drain_s=1.0)
    assert isinstance(verdict((1.0, 0.5), waited_s=1.01), Reject)


def test_who_is_not_first_in_line_waits_or_is_refused_for_those_ahead() -> None:
    assert isinstance(verdict((0.0, 0.5), ahead_s=1.0), Wait)
    assert verdict((0.0, 0.5), ahead_s=4.0) == Reject(retry_after_s=2.5)


def test_what_is_not_measured_is_admitted() -> None:
    assert verdict() == Admit()


@pytest.mark.parametrize("load", [None, DecodeLoad(0.3, 0.0), DecodeLoad(1.0, 0.0)])
def test_a_decode_worker_that_keeps_the_target_or_is_not_known_refuses_nobody(
    load: DecodeLoad | None,
) -> None:
    assert decide_decode(load) == Admit()


@pytest.mark.parametrize(("drain_s", "retry_s"), [(0.0, 1.0), (7.0, 7.0), (500.0, 60.0)])
def test_a_full_decode_pool_refuses_until_enough_answers_have_ended(
    drain_s: float, retry_s: float
) -> None:
    assert decide_decode(DecodeLoad(1.1, drain_s)) == Reject(retry_s, RejectReason.DECODE)
