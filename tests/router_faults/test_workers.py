"""A worker is killed, hangs or is slow while four routers serve: nobody's answer is lost or wrong.

The text of the timed engine is a function of the prompt alone, so each answer is known beforehand.
"""

import asyncio
from collections.abc import AsyncIterator

import pytest

from cluster.probe import view_of_router
from core import telemetry
from core.clock import SystemClock
from tests.forks import Forked
from tests.router_faults.bodies import (
    LEASE_S,
    run_frozen_worker,
    run_slow_worker,
    run_strict_router,
)
from tests.router_faults.fleet import (
    REQUEST_TIMEOUT_S,
    SILENCE_S,
    RunningFleet,
    running_fleet,
)
from tests.router_faults.load import CLIENTS, Load, under_load
from tests.router_faults.outage import outlive_redis

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

EACH_KIND = pytest.mark.parametrize("name", ["p0", "d0"], ids=["prefill", "decode"])
ENOUGH = 20
"""Answers that a healthy fleet gives in a moment."""


@pytest.fixture(scope="module")
async def fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningFleet]:
    async with running_fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running


async def more(load: Load, answers: int = ENOUGH) -> None:
    """Wait until so many more answers have come."""
    wanted = load.answered + answers
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        while load.answered < wanted:
            await asyncio.sleep(0.01)


async def busy(fleet: RunningFleet, name: str) -> None:
    """Wait until the worker has something to lose."""
    async with asyncio.timeout(REQUEST_TIMEOUT_S):
        while not (await fleet.workers[name].stats()).open_legs:
            await asyncio.sleep(0.001)


def nothing_lost(load: Load) -> None:
    assert load.wrong == []
    assert load.slowest_s < REQUEST_TIMEOUT_S


@EACH_KIND
async def test_a_killed_worker_costs_no_answer(fleet: RunningFleet, name: str) -> None:
    retries = await fleet.total(telemetry.RETRIES)
    async with under_load(fleet) as load:
        await more(load)
        await busy(fleet, name)
        fleet.workers[name].process.stop()  # so what it has does not end before its end
        await asyncio.sleep(0.1 * SILENCE_S)
        fleet.workers[name].process.kill()
        await more(load)
        await fleet.replace(name)
        await more(load)
    nothing_lost(load)
    assert await fleet.total(telemetry.RETRIES) > retries
    await fleet.clean()


@EACH_KIND
async def test_a_worker_that_hangs_costs_no_answer(fleet: RunningFleet, name: str) -> None:
    retries = await fleet.total(telemetry.RETRIES)
    async with under_load(fleet) as load:
        await more(load)
        await busy(fleet, name)
        fleet.workers[name].process.stop()
        await asyncio.sleep(1.5 * SILENCE_S)
        await more(load)
        fleet.workers[name].process.resume()
        await fleet.connected()
        await more(load)
    nothing_lost(load)
    assert await fleet.total(telemetry.RETRIES) > retries
    await fleet.clean()


@EACH_KIND
async def test_a_slow_worker_costs_no_answer(fleet: RunningFleet, name: str) -> None:
    async with under_load(fleet) as load:
        await more(load)
        await slowed(fleet.workers[name].process, seconds=2.0)
        await more(load)
    nothing_lost(load)
    await fleet.clean()


async def slowed(process: Forked, seconds: float) -> None:
    """A third of the speed: it stands still for two of three short periods."""
    clock = SystemClock()
    end_s = clock.now_s() + seconds
    try:
        while clock.now_s() < end_s:
            process.stop()
            await asyncio.sleep(0.06)
            process.resume()
            await asyncio.sleep(0.03)
    finally:
        process.resume()


@EACH_KIND
async def test_a_worker_far_slower_than_its_peers_is_left_out(
    fleet: RunningFleet, name: str
) -> None:
    await fleet.workers[name].close()
    await fleet.start_worker(name, run_slow_worker)
    strict = await fleet.start_router(run_strict_router)
    await fleet.connected()
    async with under_load(fleet, only=strict) as load:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            while (await view_of_router(strict.url)).ejected.get(name) != "slow":
                await asyncio.sleep(0.05)
        served = load.prefilled_by if name.startswith("p") else load.decoded_by
        before = served[name]
        await more(load, 3 * ENOUGH)
        assert served[name] - before <= CLIENTS, "no more than it had when it was ejected"
    nothing_lost(load)
    strict.process.kill()
    fleet.routers.remove(strict)
    await fleet.replace(name)
    await fleet.clean()


async def test_the_other_routers_go_on_when_one_is_killed(fleet: RunningFleet) -> None:
    async with under_load(fleet) as load:
        await more(load)
        fleet.routers[0].process.kill()
        await more(load)
    del fleet.routers[0]
    nothing_lost(load)
    await fleet.clean()
    fresh = await fleet.start_router()
    await fleet.until_router(fresh, telemetry.WORKERS_CONNECTED, len(fleet.workers))


async def test_traffic_goes_on_while_redis_hangs_for_six_leases(fleet: RunningFleet) -> None:
    """A minute of those of 10 s that workers take outside tests."""
    async with under_load(fleet) as load:
        await more(load)
        fleet.redis.freeze()
        try:
            await asyncio.sleep(6 * LEASE_S)
            await more(load)
            await fleet.connected()
        finally:
            fleet.redis.thaw()
        await more(load)
    nothing_lost(load)
    await fleet.clean()
    await fleet.connected()


async def test_streams_and_requests_go_on_while_redis_is_stopped(fleet: RunningFleet) -> None:
    """tests/faults/test_registry_outage.py stops it for a minute."""
    await outlive_redis(fleet, 3 * LEASE_S, step_s=0.008)


async def test_a_worker_whose_reports_freeze_is_not_chosen_for_ever(fleet: RunningFleet) -> None:
    await fleet.workers["p2"].close()
    await fleet.start_worker("p2", run_frozen_worker)
    await fleet.connected()
    async with under_load(fleet, clients=24) as load:
        await more(load, 5 * ENOUGH)
        before, of_all = load.prefilled_by["p2"], load.answered
        await more(load, 5 * ENOUGH)
        share = (load.prefilled_by["p2"] - before) / (load.answered - of_all)
    nothing_lost(load)
    assert share < 0.5, "it says that it is idle, and of three workers it takes most prompts"
    await fleet.clean()
