import pytest

from core.clock import FakeClock, SystemClock


def test_fake_time_moves_only_when_told() -> None:
    clock = FakeClock(5.0)
    assert (clock.now_s(), clock.wall_s()) == (5.0, 5.0)
    clock.advance(1.5)
    assert (clock.now_s(), clock.wall_s()) == (6.5, 6.5)


def test_fake_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="cannot go back by 1"):
        FakeClock().advance(-1)


def test_system_time_is_monotonic_and_its_wall_is_the_epochs() -> None:
    clock = SystemClock()
    first = clock.now_s()
    assert clock.now_s() >= first
    assert clock.wall_s() > 1.7e9
