"""The error worth telling of a group."""

from cluster.failures import describe, first_error
from core.errors import ConfigError, Unavailable


def test_an_error_of_ours_is_told_before_any_other() -> None:
    ours = ConfigError("no weights")
    group = BaseExceptionGroup("x", [ValueError("a"), ExceptionGroup("y", [OSError("b"), ours])])
    assert first_error(group) is ours
    assert describe(group) == "no weights"


def test_without_one_the_first_is_told_with_its_type() -> None:
    assert describe(ExceptionGroup("x", [ValueError("a"), OSError("b")])) == "ValueError: a"


def test_a_single_error_is_itself() -> None:
    error = Unavailable("gone")
    assert first_error(error) is error
