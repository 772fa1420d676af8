"""How often each row is repeated, and the zygote all its processes are forked from."""

import os
from collections.abc import Iterator

import pytest

from tests.faults.zygote import Zygote


@pytest.fixture(scope="session")
def repeats() -> int:
    """BATON_FAULT_REPEATS; `make test-faults` sets 200, from where leaks are looked for."""
    return int(os.environ.get("BATON_FAULT_REPEATS", "2"))


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()
