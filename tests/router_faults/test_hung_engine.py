"""The engine of a decode worker hangs in mid-answer, while its process is well: its clients get the
same text from another one, long before engine.step_timeout_s.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.probe import view_of_router
from core import telemetry
from tests.cluster.test_router_main import bare_directory
from tests.router_faults.bodies import run_halting_worker
from tests.router_faults.fleet import (
    REQUEST_TIMEOUT_S,
    RunningFleet,
    RunningRouter,
    running_fleet,
    settings_of,
)
from tests.router_faults.load import under_load
from tests.router_faults.test_workers import ENOUGH, busy, more, nothing_lost

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

FLOOR_S = 1.0


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[RunningFleet]:
    settings = settings_of(bare_directory(tmp_path))
    settings["router"]["hung_step_s"] = FLOOR_S
    async with running_fleet(tmp_path, settings, routers=1, workers=["p0", "d0"]) as running:
        await running.start_worker("d1", run_halting_worker)
        await running.connected()
        yield running


async def ejected(fleet: RunningFleet, router: RunningRouter, reason: str) -> float:
    """How often a worker was left out for it."""
    reply = await fleet.client.get(f"{router.url}/metrics")
    return sum(
        sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
        if sample.name == telemetry.WORKERS_EJECTED and sample.labels["reason"] == reason
    )


async def until_left_out(router: RunningRouter, names: dict[str, str]) -> None:
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        while (await view_of_router(router.url)).ejected != names:
            await asyncio.sleep(0.05)


async def test_answers_go_on_elsewhere_while_an_engine_hangs(fleet: RunningFleet) -> None:
    (router,), halting = fleet.routers, fleet.workers["d1"].process
    async with under_load(fleet) as load:
        await more(load, 3 * ENOUGH)  # the engines have warmed up
        assert load.decoded_by["d1"], "it takes part"
        await busy(fleet, "d1")
        os.kill(halting.pid, signal.SIGUSR1)
        await until_left_out(router, {"d1": "hung"})
        await more(load, ENOUGH)  # answers that had ended there have been read
        before = load.decoded_by["d1"]
        await more(load, 3 * ENOUGH)
        assert load.decoded_by["d1"] == before, "nothing goes there, and nothing comes from there"
        assert not (await fleet.workers["d1"].stats()).open_legs, "what it had is given up"
        assert await ejected(fleet, router, "hung") == 1
        assert await fleet.total(telemetry.RETRIES) > 0
        os.kill(halting.pid, signal.SIGUSR2)
        await until_left_out(router, {})
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            while load.decoded_by["d1"] == before:
                await asyncio.sleep(0.05)
    nothing_lost(load)
    await fleet.clean()
