"""Finding the error worth telling inside what a TaskGroup raises."""

from core.errors import BatonError


def first_error(error: BaseException) -> BaseException:
    """Of a group its first BatonError, or else its first error; another error is itself."""
    leaves = _leaves(error)
    return next((leaf for leaf in leaves if isinstance(leaf, BatonError)), leaves[0])


def describe(error: BaseException) -> str:
    """One line that says what went wrong."""
    first = first_error(error)
    return first.message if isinstance(first, BatonError) else f"{type(first).__name__}: {first}"


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner)]
