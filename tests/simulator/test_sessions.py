"""Sessions in closed loops: when a turn is asked, how many are open, and what load they make."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from core.errors import InvalidRequest
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.clients import ClosedSessions
from simulator.closed import _begin_midway, _Judge, run_sessions, sessions_needed
from simulator.cluster import Cluster, Outcome
from simulator.config import SimulationConfig
from simulator.goodput import SYSTEMS, Question, search
from simulator.job import Record
from simulator.spec import SimSpec
from simulator.workload.types import SimRequest
from tests.simulator.clusters import run, split
from tests.simulator.test_goodput import QUESTION, SETTINGS


def turn(session: str, at_s: float, think_s: float | None = None, output: int = 11) -> SimRequest:
    return SimRequest(at_s, 160, output, (), session, think_s)


def closed(spec: SimSpec | None = None, sessions: int | None = None) -> SimSpec:
    return replace(spec or split(), closed_sessions=True, sessions=sessions)


def of(outcome: Outcome, session: str) -> list[Record]:
    return [record for record in outcome.records if record.session == session]


def test_a_turn_is_asked_its_pause_after_the_answer_before_it_ended() -> None:
    turns = [turn("a", 0.0), turn("a", 0.1, think_s=2.0), turn("a", 50.0, think_s=0.5)]
    first, second, third = of(run(closed(), turns), "a")
    assert second.at_s == pytest.approx(first.end_s + 2.0)
    assert third.at_s == pytest.approx(second.end_s + 0.5)
    assert [r.at_s for r in run(split(), turns).records] == [0.0, 0.1, 50.0]


def test_sessions_wait_for_their_own_answers_alone() -> None:
    turns = [turn("a", 0.0, output=200), turn("b", 0.0), turn("a", 9.0, 0.0), turn("b", 9.0, 0.0)]
    outcome = run(closed(split(2, 2)), turns)
    (a1, a2), (b1, b2) = of(outcome, "a"), of(outcome, "b")
    assert a2.at_s == pytest.approx(a1.end_s)
    assert b2.at_s == pytest.approx(b1.end_s)
    assert b2.at_s < a1.end_s


def test_a_session_begins_when_one_of_those_at_once_is_over() -> None:
    turns = [turn(name, at_s) for at_s, name in enumerate("abcd")]
    turns += [turn(name, 90.0, 1.0) for name in "abcd"]
    outcome = run(closed(sessions=2), turns)
    assert len(outcome.records) == 8
    spans = [(of(outcome, name)[0].at_s, of(outcome, name)[-1].end_s) for name in "abcd"]
    for at_s, _ in spans:
        assert sum(begin <= at_s < end for begin, end in spans) <= 2
    assert sorted(begin for begin, _ in spans)[2:] == sorted(end for _, end in spans)[:2]


def test_a_refused_turn_is_asked_again_when_it_was_told_to_and_does_not_end_its_session() -> None:
    spec = replace(split(), router=RouterConfig(), slo=Slo(ttft_s=0.4, tpot_s=0.1))
    turns = [turn(f"s{i}", 0.01 * i + k, 0.1 if k else None) for i in range(30) for k in range(3)]
    outcome = run(closed(spec), sorted(turns, key=lambda request: request.at_s))
    again = [record for record in outcome.records if record.is_asked_again]
    assert again
    assert len(outcome.records) == 90 + len(again)
    for record in again:
        assert record.retry_after_s is not None
        mine = of(outcome, record.session)
        following = mine[mine.index(record) + 1]
        assert following.at_s == pytest.approx(record.at_s + record.retry_after_s, abs=0.5)
        assert following.prompt_tokens == record.prompt_tokens
    for i in range(30):
        mine = of(outcome, f"s{i}")
        assert sum(not record.is_asked_again for record in mine) == 3


def test_who_was_refused_three_times_goes_on() -> None:
    clients = ClosedSessions([turn("s", 0.0, None), turn("s", 1.0, 0.5)])
    refused = Record(0.0, 16, 1, retry_after_s=2.0, session="s")
    for _ in range(2):
        again = clients.after(refused, 7.0)
        assert again is not None
        assert (again.is_same, again.request.at_s) == (True, 9.0)
    following = clients.after(refused, 7.0)
    assert following is not None
    assert (following.is_same, following.request.at_s) == (False, 7.5)


def test_requests_without_a_session_are_sessions_of_one() -> None:
    alone = ClosedSessions([SimRequest(0.0, 16, 1), SimRequest(1.0, 16, 1)], at_once=1)
    assert [request.at_s for request in alone.coming] == [0.0]
    ended = Record(0.0, 16, 1, outcome="ok")
    following = alone.after(ended, 7.0)
    assert following is not None
    assert following.request.at_s == 7.0
    assert alone.after(ended, 9.0) is None


def test_closed_loops_slow_down_with_the_cluster_and_open_ones_do_not() -> None:
    turns = [turn(f"s{i}", 0.0 if not k else 0.2 * k, 0.1 if k else None) for i in range(20)
             for k in range(5)]  # fmt: skip
    turns.sort(key=lambda request: request.at_s)
    open_loop, closed_loop = run(split(), turns), run(closed(), turns)
    assert max(r.at_s for r in open_loop.records) == pytest.approx(0.8)
    assert max(r.at_s for r in closed_loop.records) > 5.0
    worst = max(r.ttft_s for r in closed_loop.records)
    assert worst < max(r.ttft_s for r in open_loop.records)


def sessions_of(count: int) -> list[SimRequest]:
    turns = [
        turn(f"s{i}", 0.05 * i + 3.0 * k, 0.4 if k else None)
        for i in range(count)
        for k in range(4)
    ]
    return sorted(turns, key=lambda request: request.at_s)


@pytest.mark.parametrize("at_once", [2, 12])
def test_more_sessions_at_once_are_more_load_until_the_targets_are_missed(at_once: int) -> None:
    spec = replace(split(), slo=Slo(ttft_s=0.5, tpot_s=0.1))
    turns = sessions_of(sessions_needed(at_once, 200, 4))
    attained = run_sessions(spec, turns, at_once, 0.9, judged=200)
    if at_once == 2:
        # A turn takes 0.262 s, with three pauses of 0.4 s to four; two sessions seldom meet.
        assert attained.share == 1.0
        assert attained.rate_per_s == pytest.approx(8 / (4 * 0.262 + 3 * 0.4), rel=0.15)
    else:
        assert attained.share < 0.9
        assert attained.rate_per_s > 0


def test_sessions_open_at_first_begin_in_their_middle_and_later_ones_whole() -> None:
    asked: list[str] = []
    midway = _begin_midway(sessions_of(40), 20, Random(0))
    turns = Counter(request.session for request in midway)
    assert {turns[f"s{i}"] for i in range(20)} == {1, 2, 3, 4}
    assert {turns[f"s{i}"] for i in range(20, 40)} == {4}
    for request in midway:
        if request.session not in asked:
            assert request.think_s is None
            assert request.at_s == pytest.approx(0.05 * int(request.session[1:]))
            asked.append(request.session)


def test_as_many_requests_are_judged_as_are_asked_for_and_those_under_way_then() -> None:
    spec = replace(split(2, 2), slo=Slo(ttft_s=5.0, tpot_s=1.0))
    turns = sessions_of(sessions_needed(6, 40, 4))
    cluster = Cluster(replace(spec, closed_sessions=True, sessions=6))
    judge = _Judge(spec.slo, turns, 6, 40, cluster.now_s)
    ended = len(cluster.run(turns, on_asked=judge.asked, enough=judge.note).records)
    assert 40 <= judge.judged <= 46
    assert judge.misses == 0
    assert 40 + 2 * 6 <= ended < len(turns)


def judge_turns(refusals: int) -> _Judge:
    """Two sessions take turns, each half a second; past the warm-up one of ten turns is first
    refused so often, which takes a millisecond each.
    """
    turns = [turn(f"s{i // 20}.{i % 2}", float(i)) for i in range(400)]
    now_s = 0.0
    judge = _Judge(Slo(ttft_s=1.0, tpot_s=1.0), turns, 2, 100, lambda: now_s)
    for i, asked in enumerate(turns):
        now_s = asked.at_s
        for _ in range(refusals if i >= 20 and i % 10 == 0 else 0):
            judge.asked(replace(asked, at_s=now_s))
            refused = Record(now_s, 160, 11, session=asked.session, outcome="refused")
            refused.is_asked_again = True
            assert not judge.note(refused)
            now_s += 0.001
        judge.asked(replace(asked, at_s=now_s))
        answered = Record(now_s, 160, 11, session=asked.session, outcome="ok")
        answered.first_s, now_s = now_s + 0.1, now_s + 0.5
        answered.end_s = now_s
        if judge.note(answered):
            break
    return judge


def test_a_turn_that_is_asked_again_is_one_turn_of_load() -> None:
    never, twice = judge_turns(0), judge_turns(2)
    assert twice.judged == never.judged
    assert twice.rate_per_s == pytest.approx(never.rate_per_s, rel=0.001)


def test_a_turn_that_was_refused_has_missed_once_though_it_is_served_in_time_after_that() -> None:
    assert judge_turns(0).misses == 0
    # A hundred turns from the ninth on are judged: among them the 21st, the 31st up to the 101st.
    assert [judge_turns(refusals).misses for refusals in (1, 2)] == [9, 9]


def test_the_same_seed_gives_the_same_closed_run() -> None:
    spec = replace(closed(split(2, 2), sessions=5), routers=3, report_s=0.2, seed=3)
    turns = sessions_of(12)
    assert Cluster(spec).run(turns) == Cluster(spec).run(turns)


def agents(tmp_path: Path) -> str:
    """Four sessions of three turns, with a second of thought before each later one."""
    rows = [
        {
            "session_id": session,
            "turn": k,
            "timestamp": 1400 * k,
            "input_length": 160,
            "output_length": 20,
            "hash_ids": [100 * session + 10 * k + i for i in range(10)],
        }
        for session in range(4)
        for k in range(3)
    ]
    file = tmp_path / "agents.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_goodput_of_closed_sessions_is_sought_by_how_many_are_open(tmp_path: Path) -> None:
    closed_loop = SimulationConfig(kv_tokens=40_960, closed_sessions=True)
    settings = replace(SETTINGS, simulation=closed_loop, slo=Slo(ttft_s=0.5, tpot_s=0.1))
    question = Question(trace=agents(tmp_path), requests=50, refine=2)
    found = search(SYSTEMS["distserve"], settings, question, seed=0)
    kept = [p for p in found.points if p.attainment >= 0.9]
    missed = [p for p in found.points if p.attainment < 0.9]
    assert kept
    assert missed
    # A prompt takes 0.16 s: one prefill worker, of two GPUs, does no more than 6.25 of them in one.
    assert 0.5 < found.rate_per_gpu_s < 3.2
    assert max(p.scale for p in kept) < max(p.scale for p in missed) < 64


def test_closing_the_loop_of_a_trace_without_sessions_is_refused() -> None:
    settings = replace(SETTINGS, simulation=SimulationConfig(closed_sessions=True))
    with pytest.raises(InvalidRequest, match="no sessions"):
        search(SYSTEMS["baton"], settings, QUESTION, seed=0)
