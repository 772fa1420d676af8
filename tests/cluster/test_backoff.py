from cluster.backoff import Backoff
from core.clock import FakeClock


def pauses(loads_s: float, serves_s: float, lives: int) -> list[float]:
    clock = FakeClock()
    backoff, found = Backoff(clock), list[float]()
    for _ in range(lives):
        backoff.began()
        clock.advance(loads_s)
        backoff.serves()
        clock.advance(serves_s)
        found.append(backoff.pause_s())
    return found


def test_a_process_that_fails_in_a_row_waits_longer_each_time() -> None:
    assert pauses(1.0, 1.0, 8) == [0.0, 1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]


def test_one_that_has_served_for_a_while_starts_at_once() -> None:
    assert pauses(1.0, 61.0, 3) == [0.0, 0.0, 0.0]


def test_what_it_takes_to_start_is_no_time_that_it_has_served() -> None:
    assert pauses(600.0, 1.0, 3) == [0.0, 1.0, 2.0]


def test_a_life_that_never_served_is_a_failure_however_long_it_was() -> None:
    clock = FakeClock()
    backoff = Backoff(clock)
    backoff.began()
    backoff.serves()
    backoff.pause_s()
    backoff.began()
    clock.advance(600.0)
    assert backoff.pause_s() == 1.0
