"""A profile: what was measured of a model on a device, or a latency model made of it."""

from dataclasses import dataclass

from core.errors import ConfigError
from engine.latency.base import LatencyModel


class BadProfile(ConfigError):
    """A file is no profile that is known here, or lacks what was asked of it."""


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """A step that computed positions [start, end) of one prompt, and nothing else."""

    start: int
    end: int
    seconds: float


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """A step that only decoded; `context_tokens` are those of all its sequences."""

    sequences: int
    context_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Whole steps. Enough of them make a latency model: see tables.py and fit.py."""

    prefill: tuple[PrefillPoint, ...]
    decode: tuple[DecodePoint, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What a simulated worker needs. `kv_tokens` is the room for KV, where the file says so or the
    device is known; `measured` are whole steps, where it has such; `model` is whose steps they are,
    where told.
    """

    name: str
    tp: int
    latency: LatencyModel
    kv_tokens: int | None = None
    measured: Measured | None = None
    model: str | None = None
