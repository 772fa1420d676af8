"""Dynamo's curves of an H200 with Llama-3.1-8B FP8: how well models meet points they have seen, and
points they have not. Every second point is left out, then the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.types import Finding, Part, ResultTable, Run
from benchmarks.validate.rig import find_profile, not_run
from engine.latency.base import LatencyModel, StepShape
from simulator.profiles.fit import fit_latency
from simulator.profiles.npz_curves import read_npz
from simulator.profiles.tables import table_of
from simulator.profiles.types import Measured

_FILE = "dynamo-planner/h200*_prefill.npz"
_MODELS: tuple[tuple[str, Callable[[Measured], LatencyModel]], ...] = (
    ("fitted", fit_latency),
    ("table", table_of),
)


@dataclass(frozen=True, slots=True)
class _Errors:
    """Absolute relative errors of points."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]


def _run(run: Run) -> Finding:
    file = find_profile(run, _FILE)
    if file is None:
        return not_run("curves", _FILE)
    measured, _ = read_npz(file, 1)
    rows, medians = [], []
    for name, make in _MODELS:
        seen, unseen = _errors(make(measured), measured), _held_out(make, measured)
        for phase, inside, outside in (
            ("prefill", seen.prefill, unseen.prefill),
            ("decode", seen.decode, unseen.decode),
        ):
            rows.append((name, phase, *_spread(inside), *_spread(outside)))
            medians.append(median(outside))
    return Finding(
        tables=(
            ResultTable(
                title=f"{len(measured.prefill)} prefill and {len(measured.decode)} decode points"
                " of an H200, absolute relative error",
                columns=("model", "phase", "in: median", "worst", "out: median", "worst"),
                texts=2,
                rows=tuple(rows),
            ),
        ),
        notes=("A table meets the points it was made of but where noise makes a curve fall.",),
        keys={"h200_out_of_sample_error": max(medians)},
    )


def _held_out(make: Callable[[Measured], LatencyModel], measured: Measured) -> _Errors:
    """Of each half of the points, from a model made of the other half."""
    halves = [
        Measured(prefill=measured.prefill[i::2], decode=measured.decode[i::2]) for i in range(2)
    ]
    first, second = (_errors(make(halves[1 - i]), halves[i]) for i in range(2))
    return _Errors(first.prefill + second.prefill, first.decode + second.decode)


def _errors(model: LatencyModel, measured: Measured) -> _Errors:
    prefill = [
        abs(model.step_s(StepShape([(point.start, point.end)])) / point.seconds - 1)
        for point in measured.prefill
    ]
    decode = [
        abs(model.step_s(StepShape([], point.sequences, point.context_tokens)) / point.seconds - 1)
        for point in measured.decode
    ]
    return _Errors(tuple(prefill), tuple(decode))


def _spread(errors: Sequence[float]) -> tuple[str, str]:
    return f"{median(errors):.1%}", f"{max(errors):.1%}"


PART = Part(
    name="curves",
    what="Dynamo's curves of an H200, in and out of sample",
    keys=("h200_out_of_sample_error",),
    run=_run,
)
