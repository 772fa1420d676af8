"""Two parts, each in order of coming."""

import pytest

from router.line import Line


def test_those_who_can_be_in_time_go_before_the_others() -> None:
    line: Line[str] = Line()
    for name, late in (("late", True), ("a", False), ("later", True), ("b", False)):
        line.append(name, late=late)
    assert list(line) == ["a", "b", "late", "later"]
    assert len(line) == 4
    assert line.next == "a"
    assert line.ahead_of("b", late=False) == ["a"]
    assert line.ahead_of(None, late=False) == ["a", "b"]
    assert line.ahead_of("late", late=True) == ["a", "b"]
    assert line.ahead_of(None, late=True) == ["a", "b", "late", "later"]


def test_one_that_leaves_is_told_apart_from_its_equals() -> None:
    line: Line[list[int]] = Line()
    first, second = [1], [1]
    line.append(first, late=True)
    line.append(second, late=True)
    line.remove(first)
    assert line.next is second
    line.appendleft(first)
    assert line.next is first
    with pytest.raises(ValueError, match="not in this line"):
        line.remove([1])


def test_one_that_turns_late_or_in_time_goes_to_the_end_of_the_others() -> None:
    line: Line[str] = Line()
    for name, late in (("a", False), ("b", False), ("late", True)):
        line.append(name, late=late)
    assert not line.move("a", late=False)
    assert not line.move("nobody", late=True)
    assert list(line) == ["a", "b", "late"]
    assert line.move("a", late=True)
    assert list(line) == ["b", "late", "a"]
    assert line.move("late", late=False)
    assert list(line) == ["b", "late", "a"]
    assert line.ahead_of("a", late=True) == ["b", "late"]
