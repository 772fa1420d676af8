"""Redis stopped for a minute under streams and load. tests/router_faults has the short form."""

import os
from pathlib import Path

import pytest

from tests.cluster.test_router_main import bare_directory
from tests.router_faults.fleet import running_fleet, settings_of
from tests.router_faults.outage import outlive_redis

LONG = "BATON_LONG_FAULTS"
OUTAGE_S = 60.0
STEP_S = 0.02

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        os.environ.get(LONG) != "1",
        reason=f"REDIS STOPPED FOR A MINUTE IS NOT TESTED: it takes 2 minutes; set {LONG}=1",
    ),
]


async def test_redis_stopped_for_a_minute_stops_no_stream_and_no_request(tmp_path: Path) -> None:
    settings = settings_of(bare_directory(tmp_path))
    settings["engine"]["timed"] = {
        "prefill_base_ms": 4,
        "decode_base_ms": 1000 * STEP_S,
        "context_tokens": 4096,
    }
    settings["router"]["request_timeout_s"] = 4 * OUTAGE_S
    async with running_fleet(
        tmp_path, settings, routers=2, workers=("p0", "p1", "d0", "d1")
    ) as fleet:
        await outlive_redis(fleet, OUTAGE_S, STEP_S)
