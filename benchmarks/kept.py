"""What parts of one run share: made when first asked for, closed when the run ends."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar, cast

T = TypeVar("T")


class Kept(ExitStack):
    """One thing per key: starting processes takes seconds. Open inside `with`."""

    def __init__(self) -> None:
        super().__init__()
        self._things: dict[Hashable, object] = {}

    def of(self, key: Hashable, make: Callable[[], AbstractContextManager[T]]) -> T:
        """The thing that `make` made, the first time it was asked for."""
        if key not in self._things:
            self._things[key] = self.enter_context(make())
        return cast(T, self._things[key])
