"""Coroutine tests run on asyncio, all on one event loop; no test reaches a hub."""

import os
from collections.abc import AsyncIterator

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
async def one_event_loop(anyio_backend: str) -> AsyncIterator[None]:
    """gRPC delivers a channel's last events after its close, also when that loop is closed."""
    yield
