"""When a worker is left out of placement, for how long, and how it comes back."""

import pytest

from core.ids import Incarnation, WorkerId
from router.outliers import OutlierRules, Outliers, ejection_s, may_eject
from router.policies.baton import Baton
from router.watcher import EjectReason, Unwatched
from tests.router.views import Workers

RULES = OutlierRules(failures=3, eject_s=5.0, max_eject_s=30.0)
A, B, C, D = PEERS = tuple(Incarnation(name) for name in "abcd")


class Noted(Unwatched):
    def __init__(self) -> None:
        self.reasons: list[EjectReason] = []
        self.readmissions = 0

    def ejected(self, reason: EjectReason) -> None:
        self.reasons.append(reason)

    def readmitted(self) -> None:
        self.readmissions += 1


class Watch:
    """Outliers with a clock."""

    def __init__(self, rules: OutlierRules = RULES, peers: tuple[Incarnation, ...] = PEERS) -> None:
        self.noted = Noted()
        self.outliers = Outliers(rules, self.noted)
        self.peers = peers
        self.now_s = 100.0

    def fails(self, worker: Incarnation, times: int = 1, *, fault: bool = False) -> None:
        for _ in range(times):
            self.now_s += 0.2
            self.outliers.failed(worker, self.peers, self.now_s, fault=fault)

    def answers(self, worker: Incarnation) -> None:
        self.outliers.answered(worker, self.now_s)

    def takes(self, seconds: dict[Incarnation, float], rounds: int, every_s: float = 1.0) -> None:
        for _ in range(rounds):
            self.now_s += every_s
            for worker, took_s in seconds.items():
                self.outliers.took(worker, self.peers, took_s, 1.0, self.now_s)

    @property
    def shut(self) -> list[Incarnation]:
        return self.outliers.shut(self.now_s)


# -- the decisions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "ejected", "may"),
    [(1, 0, False), (2, 0, True), (2, 1, False), (3, 1, False), (9, 2, True), (9, 3, False)],
)
def test_a_share_of_a_pool_may_be_ejected_and_never_the_last(
    pool: int, ejected: int, may: bool
) -> None:
    assert may_eject(pool, ejected, 1 / 3) is may


def test_each_ejection_takes_twice_as_long_up_to_a_bound() -> None:
    assert [ejection_s(RULES, n) for n in (0, 1, 2, 3, 99)] == [5, 10, 20, 30, 30]


# -- failures -----------------------------------------------------------------------------------


def test_failures_in_a_row_eject() -> None:
    watch = Watch()
    watch.fails(A, 2)
    assert watch.shut == []
    watch.fails(A)
    assert watch.shut == [A]
    assert watch.outliers.ejected_for(A)
    assert watch.noted.reasons == [EjectReason.FAILURES]


def test_an_answer_in_between_starts_the_row_anew() -> None:
    watch = Watch()
    watch.fails(A, 2)
    watch.answers(A)
    watch.fails(A, 2)
    assert watch.shut == []


def test_legs_that_a_stream_takes_with_it_are_one_failure() -> None:
    watch = Watch()
    for _ in range(10):
        watch.outliers.failed(A, PEERS, watch.now_s)
    assert watch.shut == []


def test_faults_after_good_beginnings_eject() -> None:
    watch = Watch()
    for _ in range(3):
        watch.answers(A)
        watch.fails(A, fault=True)
    assert watch.shut == [A]


def test_a_complete_answer_starts_the_row_of_faults_anew() -> None:
    watch = Watch()
    for _ in range(9):
        watch.fails(A, fault=True)
        watch.answers(A)
        watch.outliers.completed(A)
    assert watch.shut == []


def test_of_two_workers_the_second_stays_however_it_fails() -> None:
    watch = Watch(peers=(A, B))
    watch.fails(A, 3)
    watch.fails(B, 30)
    assert [watch.outliers.ejected_for(w) for w in (A, B)] == [EjectReason.FAILURES, None]


def test_switched_off_nobody_is_ejected() -> None:
    watch = Watch(OutlierRules(failures=0, eject_s=5.0))
    watch.fails(A, 30)
    assert watch.shut == []


# -- the way back -------------------------------------------------------------------------------


def test_when_its_time_is_up_one_probe_at_a_time_may_go_there() -> None:
    watch = Watch()
    watch.fails(A, 3)
    watch.now_s += 5.1
    assert watch.shut == []
    watch.outliers.placed(A, watch.now_s)
    assert watch.shut == [A]
    watch.now_s += RULES.probe_s
    assert watch.shut == []


def test_a_probe_that_is_answered_readmits() -> None:
    watch = Watch()
    watch.fails(A, 3)
    watch.now_s += 5.1
    watch.outliers.placed(A, watch.now_s)
    watch.answers(A)
    assert (watch.shut, watch.outliers.ejected_for(A), watch.noted.readmissions) == ([], None, 1)


def test_an_answer_from_before_the_ejection_does_not_readmit() -> None:
    watch = Watch()
    watch.fails(A, 3)
    watch.answers(A)
    assert watch.shut == [A]


def test_a_probe_that_fails_ejects_for_twice_as_long() -> None:
    watch = Watch()
    watch.fails(A, 3)
    watch.now_s += 5.1
    watch.outliers.placed(A, watch.now_s)
    watch.fails(A)
    watch.now_s += 9.9
    assert watch.shut == [A]
    watch.now_s += 0.2
    assert watch.shut == []


def test_after_being_well_for_long_the_next_ejection_is_short_again() -> None:
    watch = Watch()
    watch.fails(A, 3)
    watch.now_s += 5.1
    watch.answers(A)
    watch.now_s += 60.0
    watch.fails(A, 3)
    watch.now_s += 5.1
    assert watch.shut == []


# -- latency ------------------------------------------------------------------------------------


def test_slower_than_its_peers_for_a_while_ejects() -> None:
    watch = Watch()
    watch.takes({A: 8.0, B: 1.0, C: 1.1, D: 0.9}, rounds=9)
    assert watch.shut == []
    watch.takes({A: 8.0, B: 1.0, C: 1.1, D: 0.9}, rounds=6)
    assert watch.shut == [A]
    assert watch.noted.reasons == [EjectReason.SLOW]


def test_all_slow_alike_ejects_nobody() -> None:
    watch = Watch()
    watch.takes(dict.fromkeys(PEERS, 20.0), rounds=40)
    assert watch.shut == []


def test_one_stall_ejects_nobody() -> None:
    watch = Watch()
    watch.takes(dict.fromkeys(PEERS, 1.0), rounds=20)
    watch.takes({A: 60.0, B: 1.0, C: 1.0, D: 1.0}, rounds=1)
    watch.takes(dict.fromkeys(PEERS, 1.0), rounds=20)
    assert watch.noted.reasons == []


def test_of_milliseconds_a_multiple_is_jitter() -> None:
    watch = Watch()
    for _ in range(40):
        watch.now_s += 1.0
        for worker, took_s in ((A, 0.008), (B, 0.001), (C, 0.001)):
            watch.outliers.took(worker, PEERS, took_s, 0.001, watch.now_s)
    assert watch.shut == []


def test_of_two_workers_the_slow_one_is_ejected() -> None:
    watch = Watch(peers=(A, B))
    watch.takes({A: 8.0, B: 1.0}, rounds=16)
    assert watch.shut == [A]


def slow_and_over() -> Watch:
    """A was ejected for being slow, and its time is up."""
    watch = Watch()
    watch.takes({A: 8.0, B: 1.0, C: 1.0, D: 1.0}, rounds=16)
    assert watch.shut == [A]
    watch.now_s += 10.1
    return watch


def test_a_slow_worker_needs_a_quick_probe_not_just_an_answer() -> None:
    watch = slow_and_over()
    watch.answers(A)
    assert watch.outliers.ejected_for(A)
    watch.outliers.took(A, PEERS, 1.0, 1.0, watch.now_s)
    assert not watch.outliers.ejected_for(A)


def test_a_slow_probe_ejects_again() -> None:
    watch = slow_and_over()
    watch.outliers.took(A, PEERS, 8.0, 1.0, watch.now_s)
    assert watch.shut == [A]


# -- a worker whose reports freeze --------------------------------------------------------------


def test_a_worker_whose_reports_freeze_is_not_chosen_for_ever() -> None:
    workers = Workers()
    frozen = workers.add("frozen")
    workers.add("other")
    policy, chosen = Baton(0.1), []
    for number in range(1, 40):
        query = workers.prefill(tokens=33, hashes=())
        decision = policy.choose(query)
        policy.placed(query, decision)
        chosen.append(decision.worker_id)
        if decision.worker_id == "frozen":
            frozen.submitted(number, 33, 33)
            assert frozen.load is not None
            frozen.reported(frozen.load)  # a heartbeat: nothing has changed
    assert chosen.count(WorkerId("frozen")) == 1


def test_a_hot_prefix_does_not_hold_traffic_at_a_frozen_worker() -> None:
    workers = Workers()
    frozen = workers.add("frozen", cached=8)
    workers.add("other")
    policy = Baton(0.1)
    for number in range(1, 1000):
        query = workers.prefill()
        decision = policy.choose(query)
        if decision.worker_id == "other":
            break
        uncached = query.tokens - query.cached_tokens(decision.worker_id)
        frozen.submitted(number, query.tokens, uncached)
    # 0.1 * what it was sent and never reported outweighs the 32 tokens it has in its cache
    assert 300 < number <= 330
