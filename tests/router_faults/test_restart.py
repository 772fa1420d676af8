"""A router that starts again knows a large fleet's caches at once, from the workers' snapshots."""

from pathlib import Path

import pytest

from core import telemetry
from core.clock import SystemClock
from tests.forks import fork
from tests.router_faults.doors import BLOCKS, DOORS, REGISTERED, run_doors
from tests.router_faults.fleet import RunningFleet, found, running_fleet

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

PROCESSES = 2
WORKERS = PROCESSES * DOORS
MAX_S = 5.0


async def test_a_restarted_router_knows_64_workers_and_a_million_blocks_in_5_s(
    tmp_path: Path,
) -> None:
    async with running_fleet(tmp_path, routers=0, workers=()) as fleet:
        started = [
            fork(run_doors, [str(fleet.config), str(i)], tmp_path / f"doors-{i}.log")
            for i in range(PROCESSES)
        ]
        try:
            for process in started:
                await found(process, f"({REGISTERED})")
            for _ in range(2):
                assert await time_to_know_all(fleet) < MAX_S
        finally:
            for process in started:
                process.kill()


async def time_to_know_all(fleet: RunningFleet) -> float:
    """Of a new router, from the start of its process, without its imports; ends it."""
    clock = SystemClock()
    began_s = clock.now_s()
    router = await fleet.start_router()
    await fleet.until_router(router, telemetry.INDEX_BLOCKS, WORKERS * BLOCKS)
    took_s = clock.now_s() - began_s
    await fleet.until_router(router, telemetry.WORKERS_CONNECTED, WORKERS)
    router.process.kill()
    fleet.routers.remove(router)
    print(f"knew all after {took_s:.2f} s")
    return took_s
