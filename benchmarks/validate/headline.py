"""Goodput of Baton's default against the peers' ways to serve, on each trace, at equal GPUs.

Everything is simulated: H100 by the roofline of the datasheet, eight workers of one GPU with
Llama-3-8B or of four with Llama-3-70B, the production router and schedulers. Baton runs with its
default config and one split for all traces. On a seed that is not judged, each disaggregated peer
is given the split that serves it best and each colocated one the tokens of a step. All systems of a
seed are asked the same requests; each seed begins where the one before ended, round and round, so
that the windows of a trace shorter than all of them overlap, and its intervals are too narrow.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from benchmarks.types import Finding, Json, Part, Progress, ResultTable, Run, Target
from decode_worker.config import DecodeConfig
from engine.config import EngineConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.build import Settings
from simulator.config import SimulationConfig
from simulator.goodput import (
    LEAST_TARGETS,
    SYSTEMS,
    Found,
    Question,
    Standing,
    System,
    rank,
    recorded_rate_per_s,
    search,
)
from simulator.processes import run_all
from simulator.workload.build import Shaping
from simulator.workload.load import load_workload, read_trace
from simulator.workload.records import trace_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T")

WORKERS = 8
DEFAULT = "baton"
_SPLIT = 2
"""Baton's prefill workers, of eight, on every trace."""
_TUNING_SEED = 1000
_LONG = Slo(ttft_s=5.0, tpot_s=0.05)
"""Prompts of thousands of tokens: the TTFT target of DualMap (ICLR'26)."""
_CHAT = Slo(ttft_s=1.0, tpot_s=0.05)
"""xLLM's defaults for TTFT (arXiv 2510.14686)."""
_LONG_PROMPT_TOKENS = 4000
_QUICK = "poisson:rate=8,prompt=3000,output=200,spread=0.8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is asked. Prompts decide how many requests a window has at least: short ones are
    served by the hundred per second.
    """

    long_requests: int
    chat_requests: int
    most_requests: int
    """Of a window that would not last long enough (`fit_window`)."""
    closed_requests: int
    """Judged of closed sessions; several times as many pass before, while these get under way."""
    tuning: float
    """Share of these that a split is judged by."""
    splits: tuple[int, ...]
    """Prefill workers, of eight, that disaggregated peers are tuned over."""
    step_tokens: tuple[int, ...]
    """That colocated peers are tuned over."""
    seeds: int
    refine: int


FULL = Size(
    long_requests=3000,
    chat_requests=8000,
    most_requests=48_000,
    closed_requests=3000,
    tuning=0.3,
    splits=(2, 3, 4, 5, 6),
    step_tokens=(256, 512, 1024, 2048),
    seeds=5,
    refine=3,
)
FULL_LARGE = replace(FULL, long_requests=1000, chat_requests=3000, tuning=0.5)
"""A worker of the large model serves a fraction of the requests: fewer last as long."""
QUICK = Size(
    long_requests=300,
    chat_requests=200,
    most_requests=200,
    closed_requests=200,
    tuning=1.0,
    splits=(4, 6),
    step_tokens=(512,),
    seeds=2,
    refine=0,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served, and the GPUs of one worker."""

    name: str
    tensor_parallel: int


SMALL = Model(name="llama-3-8b", tensor_parallel=1)
LARGE = Model(name="llama-3-70b", tensor_parallel=4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace and its targets."""

    trace: str
    name: str
    slo: Slo
    requests: int
    model: Model = SMALL
    closed: bool = False
    """Recorded sessions are replayed in closed loops."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is tuned of a system."""

    prefill_workers: int
    """0: all workers do both."""
    step_tokens: int

    def __str__(self) -> str:
        if not self.prefill_workers:
            return f"colocated, {self.step_tokens} per step"
        return f"{self.prefill_workers}P:{WORKERS - self.prefill_workers}D"


_STEP_TOKENS = EngineConfig().step_tokens
OURS = Setup(_SPLIT, _STEP_TOKENS)


@dataclass(frozen=True, slots=True)
class Judged:
    """All systems on one trace, best first, how each was set up, and the requests of each seed's
    window.
    """

    standings: list[Standing]
    setups: dict[str, Setup]
    requests: list[int]


def judge_case(case: Case, size: Size, processes: int, progress: Progress) -> Judged:
    """Tune the peers, then search on the seeds that are judged. `progress` counts searches."""
    trials = [
        (setup, peer)
        for peer in SYSTEMS.values()
        if peer.name != DEFAULT
        for setup in _setups(peer, size)
    ]
    told = _Told(progress, case.name, 1 + len(trials) + size.seeds * len(SYSTEMS))
    setups, load = _tune(case, size, trials, processes, told)
    fits = [(case, size, _question(case, size, load, seed), seed) for seed in range(size.seeds)]
    fitted = list(told.each("judged", run_all(fit_window, fits, processes)))
    tasks = [
        (system, _settings(case, setups[system.name]), fit.question, fit.found.seed)
        for fit in fitted
        for system in SYSTEMS.values()
        if system.name != DEFAULT
    ]
    peers = told.each("judged", run_all(search, tasks, processes))
    found = [*(fit.found for fit in fitted), *peers]
    return Judged(rank(found), setups, [fit.question.requests for fit in fitted])


@dataclass(frozen=True, slots=True)
class Fitted:
    """What all systems of a seed are asked, and what Baton reaches there."""

    question: Question
    found: Found


def fit_window(case: Case, size: Size, question: Question, seed: int, part: float = 1.0) -> Fitted:
    """As many requests as last `LEAST_TARGETS` TTFT targets at the rate that Baton reaches with
    them, at most `most_requests`, or a `part` of both. Closed sessions go on until enough of them
    are judged.
    """
    settings = _settings(case, OURS)
    least_s = part * LEAST_TARGETS * case.slo.ttft_s
    most = int(part * size.most_requests)
    gpus = WORKERS * case.model.tensor_parallel
    while True:
        found = search(SYSTEMS[DEFAULT], settings, question, seed)
        needed = min(ceil(found.rate_per_gpu_s * gpus * least_s), most)
        if case.closed or needed <= question.requests:
            return Fitted(question, found)
        question = replace(question, requests=needed)
        scale = found.rate_per_gpu_s * gpus / recorded_rate_per_s(question, seed)
        question = replace(question, first_scale=scale)


@dataclass(slots=True)
class _Told:
    """Searches of a case that have ended."""

    progress: Progress
    case: str
    total: int
    done: int = 0

    def each(self, what: str, ended: Iterable[T]) -> Iterator[T]:
        """The same, and the progress hears of each."""
        self.progress(f"{self.case}: {what}", self.done, self.total)
        for one in ended:
            self.done += 1
            self.progress(f"{self.case}: {what}", self.done, self.total)
            yield one


def _tune(
    case: Case,
    size: Size,
    trials: Sequence[tuple[Setup, System]],
    processes: int,
    told: _Told,
) -> tuple[dict[str, Setup], float]:
    """How each system is set up, and where Baton ends: at so many sessions, or requests/s."""
    question = Question(trace=case.trace, requests=int(case.requests * size.tuning), refine=1)
    (first,) = told.each("tuning", [fit_window(case, size, question, _TUNING_SEED, size.tuning)])
    question = first.question
    scale = _scale_of(first.found, question.share) or question.first_scale
    question = replace(question, first_scale=scale / 2, growth=1.25)
    tasks = [(setup, peer, case, question) for setup, peer in trials]
    tried: dict[str, list[tuple[float, float, int, int]]] = {}
    for setup, one in told.each("tuning", run_all(_try, tasks, processes)):
        key = one.rate_per_gpu_s, _kept(one), setup.prefill_workers, setup.step_tokens
        tried.setdefault(one.system, []).append(key)
    setups = {name: Setup(*max(keys)[2:]) for name, keys in tried.items()}
    if not case.closed:
        scale *= recorded_rate_per_s(first.question, _TUNING_SEED)
    return {DEFAULT: OURS} | setups, scale


def _setups(peer: System, size: Size) -> list[Setup]:
    if peer.colocated:
        return [Setup(0, tokens) for tokens in size.step_tokens]
    return [Setup(split, _STEP_TOKENS) for split in size.splits]


def _try(setup: Setup, system: System, case: Case, question: Question) -> tuple[Setup, Found]:
    return setup, search(system, _settings(case, setup), question, _TUNING_SEED)


def _kept(found: Found) -> float:
    """The share kept at the rate found, which tells setups with the same rate apart."""
    return max(
        (p.attainment for p in found.points if p.rate_per_gpu_s == found.rate_per_gpu_s),
        default=0.0,
    )


def _scale_of(found: Found, share: float) -> float:
    """Of the best rate that kept the share; 0 if none did."""
    return max((p.scale for p in found.points if p.attainment >= share), default=0)


def _question(case: Case, size: Size, load: float, seed: int) -> Question:
    """Of one seed, begun at so many sessions, or requests/s."""
    question = Question(
        trace=case.trace, requests=case.requests, refine=size.refine, first_scale=load, growth=1.25
    )
    if case.closed:
        return question
    return replace(question, first_scale=load / recorded_rate_per_s(question, seed))


def _settings(case: Case, setup: Setup) -> Settings:
    prefill_workers = setup.prefill_workers or _SPLIT
    return Settings(
        simulation=SimulationConfig(
            profile="roofline:h100",
            model=case.model.name,
            tensor_parallel=case.model.tensor_parallel,
            closed_sessions=case.closed,
        ),
        engine=_engine(setup),
        router=RouterConfig(),
        slo=case.slo,
        prefill_workers=prefill_workers,
        decode_workers=WORKERS - prefill_workers,
        max_queued_tokens=PrefillConfig().max_queued_tokens,
        max_sequences=DecodeConfig().max_sequences,
    )


def _engine(setup: Setup) -> EngineConfig:
    """Colocated peers take as much of one prompt as fits into a step."""
    if setup.prefill_workers:
        return EngineConfig(step_tokens=setup.step_tokens)
    return EngineConfig(step_tokens=setup.step_tokens, chunk_tokens=setup.step_tokens)


def _cases(run: Run, size: Size, model: Model) -> list[Case]:
    if not run.traces:
        return [_case(_QUICK, "poisson", size, prompt_tokens=3000, model=model)]
    cases = []
    for trace in run.traces:
        shaping = Shaping(requests=200)
        requests = load_workload(trace, shaping).workload.requests
        mean = sum(r.prompt_tokens for r in requests) / len(requests)
        case = _case(str(trace), trace_name(trace), size, prompt_tokens=mean, model=model)
        cases.append(_closed(case, size) if _has_timed_sessions(trace) else case)
    return cases


def _has_timed_sessions(trace: Path) -> bool:
    recorded = read_trace(trace, Shaping(requests=200))
    return recorded.timed and bool(recorded.records[0].session)


def _closed(case: Case, size: Size) -> Case:
    return replace(case, closed=True, requests=size.closed_requests)


def _case(trace: str, name: str, size: Size, *, prompt_tokens: float, model: Model = SMALL) -> Case:
    is_long = prompt_tokens >= _LONG_PROMPT_TOKENS
    return Case(
        trace=trace,
        name=name,
        slo=_LONG if is_long else _CHAT,
        requests=size.long_requests if is_long else size.chat_requests,
        model=model,
    )


def _run(run: Run, model: Model, full: Size, key: str) -> Finding:
    size = QUICK if run.quick else full
    cases, found = _cases(run, size, model), dict[str, Judged]()
    for case in cases:
        found[case.name] = judge_case(case, size, os.cpu_count() or 1, run.progress)
    gpus = WORKERS * model.tensor_parallel
    return Finding(
        tables=tuple(_table(case, found[case.name]) for case in cases),
        targets=tuple(_target(name, judged.standings) for name, judged in found.items()),
        notes=(
            f"simulated: {gpus} H100, {model.name}, {size.seeds} seeds, whose windows overlap"
            " where the trace is shorter than all of them; the first tenth of a run does not count;"
            " +- is half of the 95 % interval, behind is paired to the best by seed",
            "recorded sessions are closed loops: as many are open at once as keep the share;"
            " text without times is asked a turn a second",
        ),
        keys={
            key: {
                name: {s.system: _json(s, judged.setups[s.system]) for s in judged.standings}
                for name, judged in found.items()
            },
            f"{key}_requests": {name: [*judged.requests] for name, judged in found.items()},
        },
        draw=lambda axes: _draw(axes, found, model),
    )


def _json(standing: Standing, setup: Setup) -> dict[str, Json]:
    return {
        "requests_per_s_per_gpu": round(standing.goodput.mean, 4),
        "half_95": round(standing.goodput.half, 4),
        "by_seed": [round(one.rate_per_gpu_s, 4) for one in standing.found],
        "prefill_workers": setup.prefill_workers,
        "step_tokens": setup.step_tokens,
    }


def _table(case: Case, judged: Judged) -> ResultTable:
    slo = case.slo
    return ResultTable(
        title=f"goodput on {case.name} (simulated), {case.model.name},"
        f" {_span(judged.requests)} requests, {slo.ttft_s:g} s and {slo.tpot_s * 1e3:g} ms",
        columns=("system", "set up", "requests/s per GPU", "+-", "behind", "+-"),
        texts=2,
        rows=tuple(
            (
                standing.system,
                str(judged.setups[standing.system]),
                f"{standing.goodput.mean:.3f}",
                f"{standing.goodput.half:.3f}",
                f"{standing.behind.mean:.3f}",
                f"{standing.behind.half:.3f}",
            )
            for standing in judged.standings
        ),
    )


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _target(name: str, rows: Sequence[Standing]) -> Target:
    ours = next(row for row in rows if row.system == DEFAULT)
    return Target(
        promise=f"{name}: baton best or within the interval of the best (simulated)",
        measured=f"{ours.goodput.mean / max(1e-9, rows[0].goodput.mean):.2f} of the best,"
        f" {rows[0].system}",
        held=ours.is_tied,
    )


def _draw(axes: Axes, found: dict[str, Judged], model: Model) -> None:
    rows = {name: judged.standings for name, judged in found.items()}
    width = 0.8 / len(SYSTEMS)
    for i, system in enumerate(SYSTEMS):
        mine = [next(row for row in case if row.system == system) for case in rows.values()]
        best = [case[0].goodput.mean or 1.0 for case in rows.values()]
        axes.bar(
            [x + i * width for x in range(len(rows))],
            [row.goodput.mean / top for row, top in zip(mine, best, strict=True)],
            width,
            yerr=[row.goodput.half / top for row, top in zip(mine, best, strict=True)],
            label=system,
        )
    axes.set_xticks([x + 0.4 for x in range(len(rows))], list(rows), rotation=20, ha="right")
    axes.set(ylabel="goodput, of the best", title=f"Goodput at equal GPUs, {model.name}, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="headline",
    what="goodput of the default against the peers' ways to serve, at equal GPUs",
    keys=("goodput", "goodput_requests"),
    run=lambda run: _run(run, SMALL, FULL, "goodput"),
)
PART_LARGE = Part(
    name="headline_70b",
    what="the same with Llama-3-70B on four GPUs per worker",
    keys=("goodput_70b", "goodput_70b_requests"),
    run=lambda run: _run(run, LARGE, FULL_LARGE, "goodput_70b"),
    option="headline_70b",
)
