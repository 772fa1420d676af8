"""What the datasheets say of devices. Numbers of aiconfigurator's `systems/*.yaml` (Apache-2.0)."""

from dataclasses import dataclass

from core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU: dense 16-bit matrix rate, memory, and its links, one way, per GPU."""

    name: str
    flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    nic_bytes_per_s: float


_GIB = 2**30

DEVICES = {
    device.name: device
    for device in (
        Device(
            name="a100",
            flops_per_s=312e12,
            memory_bytes=80 * _GIB,
            memory_bytes_per_s=2.039e12,
            nvlink_bytes_per_s=300e9,
            nic_bytes_per_s=25e9,
        ),
        Device(
            name="h100",
            flops_per_s=989e12,
            memory_bytes=80 * _GIB,
            memory_bytes_per_s=3.35e12,
            nvlink_bytes_per_s=450e9,
            nic_bytes_per_s=50e9,
        ),
        Device(
            name="h200",
            flops_per_s=989e12,
            memory_bytes=141e9,
            memory_bytes_per_s=4.8e12,
            nvlink_bytes_per_s=450e9,
            nic_bytes_per_s=50e9,
        ),
        Device(
            name="l40s",
            flops_per_s=362e12,
            memory_bytes=48 * _GIB,
            memory_bytes_per_s=864e9,
            nvlink_bytes_per_s=32e9,
            nic_bytes_per_s=25e9,
        ),
    )
}
"""Known by name. The L40S has no NVLink: its ranks talk over PCIe 4."""


def find_device(name: str) -> Device:
    """Raises ConfigError naming those that are known."""
    if name not in DEVICES:
        raise ConfigError(f"there is no datasheet of {name!r}; there is: {', '.join(DEVICES)}")
    return DEVICES[name]
