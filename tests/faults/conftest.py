"""How often each row is repeated, and the zygote all its processes are forked from."""

import os
from collections.abc import Iterator

import pytest

from tests.faults.zygote import Zygote

_HERE = "tests/faults/"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """BATON_FAULT_SHARD=1/3 runs every third row, 2/3 and 3/3 the others; without it all run."""
    shard, _, shards = os.environ.get("BATON_FAULT_SHARD", "1/1").partition("/")
    rows = [item for item in items if item.nodeid.startswith(_HERE)]
    left_out = {id(row) for i, row in enumerate(rows) if i % int(shards) != int(shard) - 1}
    config.hook.pytest_deselected(items=[item for item in items if id(item) in left_out])
    items[:] = [item for item in items if id(item) not in left_out]


@pytest.fixture(scope="session")
def repeats() -> int:
    """BATON_FAULT_REPEATS; `make test-faults` sets 200, from where leaks are looked for."""
    return int(os.environ.get("BATON_FAULT_REPEATS", "2"))


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    started = Zygote()
    yield started
    started.close()
