"""From settings to what is simulated."""

from dataclasses import replace

import pytest

from core.errors import ConfigError
from simulator.build import build_spec
from simulator.config import SimulatedPool, SimulationConfig
from simulator.goodput import SYSTEMS
from simulator.goodput import settings_of as settings_of_system
from simulator.spec import PoolRole, SimSpec
from tests.simulator.test_goodput import SETTINGS


def test_each_pool_has_its_own_nic_or_that_of_the_cluster() -> None:
    pools = (
        SimulatedPool(name="a100", role="prefill", workers=1, nic_gb_per_s=25),
        SimulatedPool(name="h100", role="decode", workers=1),
    )
    simulation = SimulationConfig(nic_gb_per_s=40, pools=pools)
    spec = build_spec(replace(SETTINGS, simulation=simulation), 16, 0)
    assert [pool.worker.nic_bytes_per_s for pool in spec.pools] == [25e9, 40e9]


def test_workers_of_other_gpus_or_another_degree_are_other_devices() -> None:
    pools = (
        SimulatedPool(name="a100", role="prefill", workers=1, profile="roofline:a100"),
        SimulatedPool(name="h100", role="prefill", workers=1, profile="roofline:h100"),
        SimulatedPool(name="two", role="decode", workers=1, tensor_parallel=2),
        SimulatedPool(name="one", role="decode", workers=1, profile="roofline:h100"),
    )
    simulation = SimulationConfig(profile="roofline:h100", model="llama-3-8b", pools=pools)
    spec = build_spec(replace(SETTINGS, simulation=simulation), 16, 0)
    a100, h100, two, one = (pool.worker.device for pool in spec.pools)
    assert len({a100, h100, two}) == 3
    assert h100 == one


def spec_of(*roles: str, system: str = "baton") -> SimSpec:
    """A pool of each of these roles."""
    pools = tuple(SimulatedPool.model_validate({"name": r, "role": r, "workers": 1}) for r in roles)
    settings = replace(SETTINGS, simulation=SimulationConfig(kv_tokens=4096, pools=pools))
    return build_spec(settings_of_system(SYSTEMS[system], settings), 16, 0)


@pytest.mark.parametrize(
    "roles", [("colocated",), ("prefill", "decode"), ("prefill", "decode", "colocated")]
)
def test_colocated_pools_stand_alone_or_beside_the_others(roles: tuple[str, ...]) -> None:
    assert [pool.role for pool in spec_of(*roles).pools] == [PoolRole(role) for role in roles]
    merged = spec_of(*roles, system="colocated-prefix")
    assert {pool.role for pool in merged.pools} == {PoolRole.COLOCATED}


@pytest.mark.parametrize(("role", "missing"), [("prefill", "decode"), ("decode", "prefill")])
@pytest.mark.parametrize("beside", [(), ("colocated",)])
def test_prefill_and_decode_pools_need_each_other(
    role: str, missing: str, beside: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=f"there is no {missing} pool"):
        spec_of(role, *beside)
