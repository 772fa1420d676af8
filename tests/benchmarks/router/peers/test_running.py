"""A peer that does not start is told apart, with its own words, and leaves nothing behind."""

from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from benchmarks.router.peers.catalog import catalog
from benchmarks.router.peers.running import begin, ready
from benchmarks.types import BenchFailed

pytestmark = pytest.mark.processes


async def test_a_router_that_ends_at_once_fails_with_its_last_line(tmp_path: Path) -> None:
    peer = next(one for one in catalog(tmp_path) if one.name == "smg")
    program = peer.path("smg")
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho starting\necho unknown flag >&2\nexit 3\n")
    program.chmod(0o755)
    before = psutil.Process().children()  # the start method of another test's processes may stay
    with ExitStack() as stack:
        front = begin(stack, peer, "tiny")
        with pytest.raises(BenchFailed, match="smg ended: unknown flag"):
            await ready(front, "tiny")
    assert psutil.Process().children() == before
