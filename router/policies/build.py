"""Policies by the names the config knows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from router.config import RouterConfig
from router.policies.base import DecodePolicy, PrefillPolicy, Slo
from router.policies.baton import Baton
from router.policies.decode import BatonDecode
from router.policies.dualmap import DualMap
from router.policies.dynamo_cost import DynamoCost
from router.policies.mooncake_ttft import MooncakeTtft
from router.policies.preble import Preble
from router.policies.prefix_affinity import PrefixAffinity
from router.policies.simple import (
    DecodeLeastLoad,
    DecodePowerOfTwo,
    LeastLoad,
    PowerOfTwo,
    RoundRobin,
    Uniform,
)

DEFAULT_SLO = Slo(ttft_s=2.0, tpot_s=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policies:
    """Who decides where a sequence goes, and the latency targets they decide by."""

    prefill: PrefillPolicy
    decode: DecodePolicy
    slo: Slo = DEFAULT_SLO
    step_s: float | None = None
    """What workers let a step take that computes part of a prompt beside answers."""
    local_decode: bool = True
    """An answer may stay where its prompt was computed; see router/local.py."""


PREFILL: Mapping[str, Callable[[RouterConfig], PrefillPolicy]] = {
    "baton": lambda config: Baton(config.prefill_queue_weight),
    "round_robin": lambda config: RoundRobin(),
    "random": lambda config: Uniform(),
    "least_load": lambda config: LeastLoad(),
    "power_of_two": lambda config: PowerOfTwo(),
    "prefix_affinity": lambda config: PrefixAffinity(),
    "dynamo_cost": lambda config: DynamoCost(),
    "mooncake_ttft": lambda config: MooncakeTtft(),
    "dualmap": lambda config: DualMap(),
    "preble": lambda config: Preble(),
}
DECODE: Mapping[str, Callable[[], DecodePolicy]] = {
    "baton": BatonDecode,
    "round_robin": RoundRobin,
    "random": Uniform,
    "least_load": DecodeLeastLoad,
    "power_of_two": DecodePowerOfTwo,
}


def build_policies(config: RouterConfig, slo: Slo = DEFAULT_SLO) -> Policies:
    """Fresh ones: what they remember is one router's."""
    prefill, decode = PREFILL[config.prefill_policy], DECODE[config.decode_policy]
    return Policies(
        prefill=prefill(config),
        decode=decode(),
        slo=slo,
        step_s=config.step_s(slo.tpot_s),
        local_decode=config.local_prefill and config.local_decode,
    )
