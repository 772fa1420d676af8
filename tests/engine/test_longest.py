"""What counts as a long step: not the first ones of an engine, and not a single one."""

from engine.longest import _COLD_STEPS, _SPAN_STEPS, LongestStep


def warm() -> LongestStep:
    longest = LongestStep()
    for _ in range(_COLD_STEPS):
        longest.add(60.0)
    return longest


def test_the_steps_of_a_cold_engine_tell_nothing() -> None:
    assert warm().seconds == 0


def test_it_is_the_second_longest_as_the_longest_may_have_hung() -> None:
    longest = warm()
    for seconds in (0.1, 100.0, 0.3, 0.2):
        longest.add(seconds)
    assert longest.seconds == 0.3


def test_what_takes_long_again_is_believed() -> None:
    longest = warm()
    for seconds in (0.1, 15.0, 0.1, 14.0):
        longest.add(seconds)
    assert longest.seconds == 14.0


def test_old_steps_are_forgotten_but_never_all_at_once() -> None:
    longest = warm()
    longest.add(3.0)
    longest.add(2.0)
    seen = []
    for _ in range(2 * _SPAN_STEPS):
        longest.add(0.1)
        seen.append(longest.seconds)
    assert seen[_SPAN_STEPS] == 2.0
    assert seen[-1] == 0.1
    assert min(seen) == 0.1
