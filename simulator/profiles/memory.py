"""Room for KV, where a profile tells the device that a worker is made of."""

from engine.latency.devices import Device, find_device
from engine.latency.shapes import ModelShape
from simulator.plan.memory import kv_capacity_tokens
from simulator.profiles.types import BadProfile

_MEMORY_SHARE = 0.9
_DEVICES = {
    "a100_sxm": "a100",
    "h100_sxm": "h100",
    "h200_sxm": "h200",
    "a100-80gb": "a100",
    "h100-80gb": "h100",
    "h100-80gb-pcap": "h100",
}
"""Names of aiconfigurator's and Splitwise's files, by those of the datasheets."""


def named_device(name: str) -> Device | None:
    """By the name that a profile has for it; None where there is no datasheet."""
    return find_device(_DEVICES[name]) if name in _DEVICES else None


def kv_room(shape: ModelShape, device: Device, tp: int) -> int:
    """Tokens of KV beside the weights. Raises BadProfile where there is room for none."""
    kv_tokens = kv_capacity_tokens(shape, device, tp, _MEMORY_SHARE)
    if kv_tokens <= 0:
        raise BadProfile(
            f"{shape.name} does not fit {device.name} at TP {tp}:"
            " raise tensor_parallel, or choose a larger device"
        )
    return kv_tokens
