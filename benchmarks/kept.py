"""What parts of one run share: made when first asked for, closed when the run ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import TypeVar, cast

T = TypeVar("T")


class Kept:
    """One thing per way to make it: starting processes takes seconds."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._things: dict[object, object] = {}

    def __enter__(self) -> Kept:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def of(self, make: Callable[[], AbstractContextManager[T]]) -> T:
        """The thing that `make` made, the first time it was asked for."""
        if make not in self._things:
            self._things[make] = self._open.enter_context(make())
        return cast(T, self._things[make])
