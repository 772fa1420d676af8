"""Goodput of Baton's default against the peers' ways to serve, on each trace, at equal GPUs.

Everything is simulated: eight H100 by the roofline of the datasheet, Llama-3-8B, the production
router and schedulers. Baton runs with its default config and one split for all traces. Each
disaggregated peer gets the split that serves it best on a seed that is not judged; colocated ones
need none. All systems of a seed are asked the same requests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from decode_worker.config import DecodeConfig
from engine.config import EngineConfig
from prefill_worker.config import PrefillConfig
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.build import Settings
from simulator.config import SimulationConfig
from simulator.goodput import SYSTEMS, Found, Question, Standing, System, rank, search
from simulator.processes import run_all
from simulator.workload.build import Shaping
from simulator.workload.load import load_workload
from simulator.workload.records import trace_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GPUS = 8
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
    """How much is asked. Prompts decide how many requests a window has: short ones are served by
    the hundred per second, and a window must last for longer than an answer.
    """

    long_requests: int
    chat_requests: int
    tuning: float
    """Share of these that a split is judged by."""
    splits: tuple[int, ...]
    """Prefill workers, of eight, that peers are tuned over."""
    seeds: int
    refine: int


FULL = Size(
    long_requests=3000,
    chat_requests=8000,
    tuning=0.3,
    splits=(2, 3, 4, 5, 6),
    seeds=5,
    refine=3,
)
QUICK = Size(long_requests=300, chat_requests=200, tuning=1.0, splits=(4, 6), seeds=2, refine=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A trace and its targets."""

    trace: str
    name: str
    slo: Slo
    requests: int


@dataclass(frozen=True, slots=True)
class Judged:
    """All systems on one trace, best first, and the prefill workers of each (0: all do both)."""

    standings: list[Standing]
    splits: dict[str, int]


def judge_case(case: Case, size: Size, processes: int) -> Judged:
    """Tune the peers, then search on the seeds that are judged."""
    splits, scale = _tune(case, size, processes)
    question = _question(case, size, scale)
    tasks = [
        (system, _settings(case.slo, splits[system.name] or _SPLIT), question, seed)
        for seed in range(size.seeds)
        for system in SYSTEMS.values()
    ]
    return Judged(rank(run_all(search, tasks, processes)), splits)


def _tune(case: Case, size: Size, processes: int) -> tuple[dict[str, int], float]:
    """Prefill workers of each system, and the rate scale Baton reaches."""
    splits = {name: 0 if system.colocated else _SPLIT for name, system in SYSTEMS.items()}
    question = Question(trace=case.trace, requests=int(case.requests * size.tuning), refine=1)
    first = search(SYSTEMS[DEFAULT], _settings(case.slo, _SPLIT), question, _TUNING_SEED)
    scale = _scale_of(first) or question.first_scale
    peers = [s for s in SYSTEMS.values() if not s.colocated and s.name != DEFAULT]
    tasks = [
        (split, peer, _settings(case.slo, split), replace(question, first_scale=scale / 2))
        for peer in peers
        for split in size.splits
    ]
    best: dict[str, tuple[float, int]] = {}
    for split, one in run_all(_rate_of_split, tasks, processes):
        best[one.system] = max(best.get(one.system, (-1.0, 0)), (one.rate_per_gpu_s, split))
    splits |= {name: split for name, (_, split) in best.items()}
    return splits, scale


def _rate_of_split(
    split: int, system: System, settings: Settings, question: Question
) -> tuple[int, Found]:
    return split, search(system, settings, question, _TUNING_SEED)


def _scale_of(found: Found) -> float:
    """Of the best rate that kept the share; 0 if none did."""
    return max(
        (p.scale for p in found.points if p.rate_per_gpu_s <= found.rate_per_gpu_s), default=0
    )


def _question(case: Case, size: Size, scale: float) -> Question:
    return Question(
        trace=case.trace,
        requests=case.requests,
        refine=size.refine,
        first_scale=scale,
        growth=1.25,
    )


def _settings(slo: Slo, prefill_workers: int) -> Settings:
    return Settings(
        simulation=SimulationConfig(profile="roofline:h100", model="llama-3-8b"),
        engine=EngineConfig(),
        router=RouterConfig(),
        slo=slo,
        prefill_workers=prefill_workers,
        decode_workers=GPUS - prefill_workers,
        max_queued_tokens=PrefillConfig().max_queued_tokens,
        max_sequences=DecodeConfig().max_sequences,
    )


def _cases(run: Run, size: Size) -> list[Case]:
    if not run.traces:
        return [_case(_QUICK, "poisson", size, prompt_tokens=3000)]
    cases = []
    for trace in run.traces:
        shaping = Shaping(requests=200)
        requests = load_workload(trace, shaping).workload.requests
        mean = sum(r.prompt_tokens for r in requests) / len(requests)
        cases.append(_case(str(trace), trace_name(trace), size, prompt_tokens=mean))
    return cases


def _case(trace: str, name: str, size: Size, *, prompt_tokens: float) -> Case:
    is_long = prompt_tokens >= _LONG_PROMPT_TOKENS
    return Case(
        trace=trace,
        name=name,
        slo=_LONG if is_long else _CHAT,
        requests=size.long_requests if is_long else size.chat_requests,
    )


def _run(run: Run) -> Finding:
    size = QUICK if run.quick else FULL
    cases, found = _cases(run, size), dict[str, Judged]()
    for i, case in enumerate(cases):
        run.progress(case.name, i, len(cases))
        found[case.name] = judge_case(case, size, os.cpu_count() or 1)
    return Finding(
        tables=tuple(_table(case, found[case.name]) for case in cases),
        targets=tuple(_target(name, judged.standings) for name, judged in found.items()),
        notes=(
            f"simulated: {GPUS} H100, Llama-3-8B, {size.seeds} seeds; the first tenth of a run does"
            " not count; +- is half of the 95 % interval, behind is paired to the best by seed",
            "sessions are replayed at their recorded stamps, not as closed loops",
        ),
        keys={
            "goodput": {
                name: {s.system: _json(s, judged.splits[s.system]) for s in judged.standings}
                for name, judged in found.items()
            }
        },
        draw=lambda axes: _draw(axes, found),
    )


def _json(standing: Standing, prefill_workers: int) -> dict[str, Json]:
    return {
        "requests_per_s_per_gpu": round(standing.goodput.mean, 4),
        "half_95": round(standing.goodput.half, 4),
        "by_seed": [round(one.rate_per_gpu_s, 4) for one in standing.found],
        "prefill_workers": prefill_workers,
    }


def _table(case: Case, judged: Judged) -> ResultTable:
    slo = case.slo
    return ResultTable(
        title=f"goodput on {case.name} (simulated), {case.requests} requests,"
        f" {slo.ttft_s:g} s and {slo.tpot_s * 1e3:g} ms",
        columns=("system", "split", "requests/s per GPU", "+-", "behind", "+-"),
        texts=2,
        rows=tuple(
            (
                standing.system,
                _split(judged.splits[standing.system]),
                f"{standing.goodput.mean:.3f}",
                f"{standing.goodput.half:.3f}",
                f"{standing.behind.mean:.3f}",
                f"{standing.behind.half:.3f}",
            )
            for standing in judged.standings
        ),
    )


def _split(prefill_workers: int) -> str:
    return f"{prefill_workers}P:{GPUS - prefill_workers}D" if prefill_workers else "colocated"


def _target(name: str, rows: Sequence[Standing]) -> Target:
    ours = next(row for row in rows if row.system == DEFAULT)
    return Target(
        promise=f"{name}: baton best or within the interval of the best (simulated)",
        measured=f"{ours.goodput.mean / max(1e-9, rows[0].goodput.mean):.2f} of the best,"
        f" {rows[0].system}",
        held=ours.is_tied,
    )


def _draw(axes: Axes, found: dict[str, Judged]) -> None:
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
    axes.set_ylabel("goodput, of the best")
    axes.set_title("Goodput at equal GPUs, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="headline",
    what="goodput of the default against the peers' ways to serve, at equal GPUs",
    keys=("goodput",),
    run=_run,
)
