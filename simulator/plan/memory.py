"""Which workers can be built: weights and KV that fit, or the numbers that say why not."""

from dataclasses import dataclass

from engine.latency.devices import Device
from engine.latency.roofline import Efficiency, RooflineLatency
from engine.latency.shapes import ModelShape
from simulator.plan.types import Option

_GB = 1e9


@dataclass(frozen=True, slots=True)
class Fit:
    """The workers of one kind of GPU that can be built, and a sentence for each that cannot."""

    options: tuple[Option, ...]
    refused: tuple[str, ...]


def find_options(
    model: ModelShape,
    device: Device,
    *,
    longest_tokens: int,
    most_gpus: int,
    memory_share: float = 0.9,
    efficiency: Efficiency | None = None,
) -> Fit:
    """Every tensor parallel degree that divides the heads, of at most `most_gpus`.

    `memory_share` of a GPU is for weights and KV; the KV must hold a request of `longest_tokens`.
    """
    options: list[Option] = []
    refused: list[str] = []
    tp = 1
    while tp <= most_gpus:
        if model.heads % tp == 0:
            kv_tokens = kv_capacity_tokens(model, device, tp, memory_share)
            if kv_tokens >= longest_tokens:
                options.append(_option(model, device, tp, kv_tokens, efficiency))
            else:
                start = _too_large(model, device, tp, memory_share)
                refused.append(start + _with_kv(model, tp, kv_tokens, longest_tokens))
        tp *= 2
    return Fit(tuple(options), tuple(refused))


def kv_capacity_tokens(model: ModelShape, device: Device, tp: int, memory_share: float) -> int:
    """Tokens of KV beside the weights; below 0 when not even those fit. Ranks beyond the KV heads
    hold copies.
    """
    left_bytes = device.memory_bytes * memory_share - model.model_bytes / tp
    return int(left_bytes / _kv_bytes_per_rank(model, tp))


def _kv_bytes_per_rank(model: ModelShape, tp: int) -> float:
    return model.kv_bytes_per_token * max(1 / tp, 1 / model.kv_heads)


def _option(
    model: ModelShape, device: Device, tp: int, kv_tokens: int, efficiency: Efficiency | None
) -> Option:
    return Option(
        gpu=device.name,
        tp=tp,
        latency=RooflineLatency(
            model=model, device=device, tp=tp, efficiency=efficiency or Efficiency()
        ),
        kv_tokens=kv_tokens,
        nic_bytes_per_s=tp * device.nic_bytes_per_s,
        nvlink_bytes_per_s=tp * device.nvlink_bytes_per_s,
    )


def _too_large(model: ModelShape, device: Device, tp: int, memory_share: float) -> str:
    usable = device.memory_bytes * memory_share / _GB
    weights = model.model_bytes / tp / _GB
    return (
        f"{model.name} does not fit {device.name} at TP {tp}: of {device.memory_bytes / _GB:.1f} GB"
        f" a GPU has {usable:.1f} GB for it, its weights take {weights:.1f} GB"
    )


def _with_kv(model: ModelShape, tp: int, kv_tokens: int, longest_tokens: int) -> str:
    if kv_tokens <= 0:
        return ""
    kv = longest_tokens * _kv_bytes_per_rank(model, tp) / _GB
    return f" and the KV of the longest request, {longest_tokens} tokens, {kv:.1f} GB"
