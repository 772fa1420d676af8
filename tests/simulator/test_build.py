"""From settings to what is simulated."""

from dataclasses import replace

from simulator.build import build_spec
from simulator.config import SimulatedPool, SimulationConfig
from tests.simulator.test_goodput import SETTINGS


def test_each_pool_has_its_own_nic_or_that_of_the_cluster() -> None:
    pools = (
        SimulatedPool(name="a100", role="prefill", workers=1, nic_gb_per_s=25),
        SimulatedPool(name="h100", role="decode", workers=1),
    )
    simulation = SimulationConfig(nic_gb_per_s=40, pools=pools)
    spec = build_spec(replace(SETTINGS, simulation=simulation), 16, 0)
    assert [pool.worker.nic_bytes_per_s for pool in spec.pools] == [25e9, 40e9]
