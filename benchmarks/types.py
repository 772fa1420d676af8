"""What a bench is made of, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from core.errors import BatonError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.kept import Kept
    from benchmarks.zygote import Zygote

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

PEERS = "peers"
"""The option of parts that measure other systems, which have to be installed first."""


class BenchFailed(BatonError):
    """A bench could not measure what it is for."""

    code = "bench_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultTable:
    """Rows for people. The first `texts` of the columns are text, the others numbers."""

    title: str
    columns: tuple[str, ...]
    texts: int
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something the design promises, and what was measured."""

    promise: str
    measured: str
    held: bool


def at_most(what: str, value: float, limit: float, unit: str) -> Target:
    """A Target that a number must not exceed."""
    return Target(
        promise=f"{what}: at most {limit:g} {unit}",
        measured=f"{value:.2f} {unit}",
        held=value <= limit,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one part found: for the terminal, for the JSON object, and one panel of the plot."""

    tables: tuple[ResultTable, ...]
    targets: tuple[Target, ...] = ()
    notes: tuple[str, ...] = ()
    keys: Mapping[str, Json] = field(default_factory=dict)
    draw: Callable[[Axes], None] | None = None


class Progress(Protocol):
    """Where a part says how far it is. Steps are counted within the part."""

    def __call__(self, text: str, done: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a part shall measure. `device` is a torch device that holds the KV arenas, `traces` the
    files a user gave to replay, `profiles` the folder of measured profiles.
    """

    quick: bool
    device: str
    progress: Progress
    zygote: Zygote
    kept: Kept
    traces: tuple[Path, ...] = ()
    profiles: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One measurement that can run alone. `keys` are those it adds to the JSON object.

    One with an `option` runs only where that is given, or its name. Keys of parts not run are null,
    or what `otherwise` has for them.
    """

    name: str
    what: str
    keys: tuple[str, ...]
    run: Callable[[Run], Finding]
    option: str | None = None
    otherwise: Mapping[str, Json] = field(default_factory=dict)
    needs_trace: bool = False
    """It can do nothing without `traces`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Parts, run in order. Which files of a user it reads is known before it starts."""

    name: str
    parts: tuple[Part, ...]
    takes_traces: bool = False
    takes_profiles: bool = False
