"""Two parts, each in order of coming."""

import pytest

from router.line import Line


def test_those_who_can_be_in_time_go_before_the_others() -> None:
    line: Line[str] = Line()
    for name, late in (("late", True), ("a", False), ("later", True), ("b", False)):
        line.append(name, late=late)
    assert list(line) == ["a", "b", "late", "later"]
    assert len(line) == 4
    assert (line.first(late=False), line.first(late=True)) == ("a", "late")
    assert line.ahead_of("b", late=False) == ["a"]
    assert line.ahead_of(None, late=False) == ["a", "b"]
    assert line.ahead_of("late", late=True) == ["a", "b"]
    assert line.ahead_of(None, late=True) == ["a", "b", "late", "later"]


def test_one_that_leaves_is_told_apart_from_its_equals() -> None:
    line: Line[list[int]] = Line()
    first, second = [1], [1]
    line.append(first, late=False)
    line.append(second, late=True)
    line.remove(second)
    assert next(iter(line)) is first
    assert line.first(late=True) is None
    line.appendleft(second)
    assert line.first(late=False) is second
    with pytest.raises(ValueError, match="not in this line"):
        line.remove([1])
