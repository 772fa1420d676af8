"""Row 6: refusing early when decode is the bottleneck (Mooncake, arXiv 2407.00079, section 7).

Published, of 23,000 requests at twice the trace's speed on 8 prefill and 8 decode instances:
4,183 refused where load is looked at before each phase, 3,771 where both loads are looked at when a
request comes, 3,589 where the decode load is predicted for the end of its prefill.

    after prefill      a prompt whose decode worker is too full once it is computed is refused then,
                       its prefill wasted (`SimSpec.late_refusals`: no production rule)
    early, current     `router.admission_decode`, and the same look afterwards
    early, predicted   the same
    never              only TTFT refuses, which all of them have

Instances are those of row 4, eight A800 each with a 70B model; a decode step reads the weights
(141 GB) and the contexts (320 KB a token) at 0.8 of the datasheet's bandwidth and takes 2 ms
beside, 0.1 ms per sequence for computing (assumed). On the trace as it is eight decode instances
never fill (the published split, first case), so the others have fewer of them and tighter targets.
Where the answers are cut to a quarter or an eighth, a prefill takes as long as an answer or longer:
the delay that makes a load read too early swing.

What users have is asked of the default config: 2 prefill and 6 decode workers, Llama-3-8B on an
H100 (cases.py), prompts of decode workers' own and refusals early or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from benchmarks.reproduce import row_04_mooncake, row_14_headroom
from benchmarks.reproduce.cases import (
    LLAMA_8B_H100,
    as_json,
    column,
    difference,
    percent,
    plot,
    seeds_of,
    show,
)
from benchmarks.reproduce.windows import (
    BLOCK,
    CONVERSATION,
    SYNTHETIC,
    at_rate,
    find_trace,
    window_of,
)
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import ENDLESS, make_worker, split_pools
from core.estimate import Estimate
from engine.latency.fitted import DecodeCurve, FittedLatency
from kv_transfer.config import TransferConfig
from router.config import DecodeAdmission, RouterConfig
from router.policies.base import Slo
from simulator.cluster import Cluster, Outcome
from simulator.pools import Sample
from simulator.spec import SimSpec
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SAMPLES = 400
_WARM_UP = 0.2
_REQUESTS, _QUICK_REQUESTS = 2400, 600
_PREFILL = make_worker(
    FittedLatency(
        prefill=row_04_mooncake.LATENCY.prefill,
        decode=(DecodeCurve(base_s=12.8e-3, per_sequence_s=1.1e-4, per_context_token_s=2.5e-8),),
    ),
    kv_tokens=3_000_000,
    block_size=BLOCK,
    step_tokens=2048,
    max_running=4,
    kv_bytes_per_token=327_680,
    link_bytes_per_s=87e9,
)
_DECODE = replace(_PREFILL, kv_blocks=1_500_000 // BLOCK, max_running=None, max_batch=1024)
"""500 GB of HBM beside the weights."""
_MEAN_OUTPUT = 343
_TTFT_S = 30.0
"""Mooncake's target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What refuses, beside TTFT."""

    name: str
    early: DecodeAdmission = "off"
    late: bool = False


NEVER = Rule(name="never")
AFTER = Rule(name="after prefill", late=True)
CURRENT = Rule(name="early, current", early="current", late=True)
PREDICTED = Rule(name="early, predicted", early="predicted", late=True)
RULES = (NEVER, AFTER, CURRENT, PREDICTED)
OURS = (
    NEVER,
    Rule(name="current", early="current"),
    Rule(name="predicted", early="predicted"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """`speed`: of the trace; `cut`: answers are that part of the recorded ones."""

    name: str
    prefills: int
    decodes: int
    tpot_s: float
    speed: float
    cut: int = 1


PUBLISHED = Case(name="8P:8D, 100 ms, x2", prefills=8, decodes=8, tpot_s=0.1, speed=2.0)
CASES = (
    PUBLISHED,
    Case(name="8P:1D, 50 ms, x2", prefills=8, decodes=1, tpot_s=0.05, speed=2.0),
    Case(name="8P:2D, 25 ms, x2.5", prefills=8, decodes=2, tpot_s=0.025, speed=2.5),
    Case(
        name="12P:1D, 25 ms, x4, answers / 4",
        prefills=12,
        decodes=1,
        tpot_s=0.025,
        speed=4.0,
        cut=4,
    ),
    Case(
        name="16P:1D, 18 ms, x5, answers / 8",
        prefills=16,
        decodes=1,
        tpot_s=0.018,
        speed=5.0,
        cut=8,
    ),
)
BOTTLENECKS = CASES[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What users ask of the default: requests per second of a workload, and its targets."""

    workload: str
    rps: float
    slo: Slo

    @property
    def name(self) -> str:
        return f"{self.workload}, {self.rps:g}/s, {1e3 * self.slo.tpot_s:g} ms"


REASONING = "reasoning"
"""Lengths of ServeGen's deepseek-r1, as in row 14."""
_LONG, _CHAT = Slo(ttft_s=5.0, tpot_s=0.05), Slo(ttft_s=2.0, tpot_s=0.02)
LOADS = (
    *(Load(workload=REASONING, rps=rps, slo=_CHAT) for rps in (20.0, 24.0, 30.0)),
    *(Load(workload=CONVERSATION, rps=rps, slo=_LONG) for rps in (9.0, 14.0)),
    *(Load(workload=SYNTHETIC, rps=rps, slo=_LONG) for rps in (16.0,)),
)
_USER_REQUESTS = {REASONING: 4000, CONVERSATION: 2000, SYNTHETIC: 1200}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fare:
    """Of one run, its warm-up left out. `swing`: standard deviation by mean of the sequences that
    decode; `queue_swing`: of the prompt tokens queued.
    """

    good: float
    refused: float
    wasted: float
    swing: float
    queue_swing: float


def serve(case: Case, rule: Rule, trace: Path | None, seed: int, count: int) -> Fare:
    """One of the paper's rules, on one window of the trace."""
    window = at_rate(_window(trace, seed, count), case.speed)
    asked = [replace(r, output_tokens=max(2, r.output_tokens // case.cut)) for r in window]
    router = RouterConfig(
        local_prefill=False,
        requeue=False,
        admission_decode=rule.early,
        admission_max_requests=ENDLESS,
        admission_max_tokens=ENDLESS,
    )
    spec = SimSpec(
        pools=split_pools(case.prefills, case.decodes, _PREFILL, _DECODE),
        router=router,
        slo=Slo(ttft_s=_TTFT_S, tpot_s=case.tpot_s),
        max_queued_tokens=ENDLESS,
        max_sequences=ENDLESS,
        late_refusals=rule.late,
        samples=_SAMPLES,
        seed=seed,
    )
    return _fare(Cluster(spec).run(asked), spec.slo)


def serve_users(load: Load, rule: Rule, trace: Path | None, seed: int, count: int) -> Fare:
    """The default config, but for the rule."""
    if load.workload == REASONING:
        asked = [
            replace(r, at_s=r.at_s / load.rps) for r in row_14_headroom.draw_requests(seed, count)
        ]
    else:
        window = _window(trace, seed, count)
        asked = at_rate(window, load.rps * window[-1].at_s / count)
    worker = make_worker(
        LLAMA_8B_H100,
        kv_tokens=400_000,
        block_size=16 if load.workload == REASONING else BLOCK,
        step_tokens=512,
        max_batch=1024,
        kv_bytes_per_token=131_072,
        link_bytes_per_s=50e9,
    )
    spec = SimSpec(
        pools=split_pools(2, 6, worker, worker),
        router=RouterConfig(admission_decode=rule.early),
        slo=load.slo,
        transfer=TransferConfig(),
        max_tokens=8192,
        samples=_SAMPLES,
        seed=seed,
    )
    return _fare(Cluster(spec).run(asked), load.slo)


def _window(trace: Path | None, seed: int, count: int) -> list[SimRequest]:
    """Drawn prompts have no answers of their own: they get those of the trace's mean."""
    window = window_of(trace, seed, count)
    return window if trace else [replace(r, output_tokens=_MEAN_OUTPUT) for r in window]


def _fare(outcome: Outcome, slo: Slo) -> Fare:
    records = outcome.records[int(_WARM_UP * len(outcome.records)) :]
    refused = [record for record in records if record.outcome == "refused"]
    good = sum(
        r.outcome == "ok" and r.ttft_s <= slo.ttft_s and r.tpot_s <= slo.tpot_s for r in records
    )
    settled = partial(_settled, outcome)
    return Fare(
        good=good / len(records),
        refused=len(refused) / len(records),
        wasted=sum(r.first_s == r.first_s for r in refused) / len(records),
        swing=_swing([sample.running for sample in settled("decode")]),
        queue_swing=_swing([sample.queued_tokens for sample in settled("prefill")]),
    )


def _settled(outcome: Outcome, pool: str) -> Sequence[Sample]:
    samples = outcome.samples[pool]
    return samples[int(_WARM_UP * len(samples)) :]


def _swing(values: Sequence[float]) -> float:
    mean = fmean(values)
    return pstdev(values) / mean if mean else 0.0


# -- the part -----------------------------------------------------------------------------------

_Found = dict[tuple[str, Rule], list[Fare]]
_COLUMNS = ("good", "refused", "wasted", "swing", "queue_swing")


def _run(run: Run) -> Finding:
    seeds, count = seeds_of(run.quick), _QUICK_REQUESTS if run.quick else _REQUESTS
    trace = find_trace(run, CONVERSATION)
    cases = CASES[3:4] if run.quick else CASES
    loads = LOADS[2:3] if run.quick else [load for load in LOADS if _is_there(load, run)]
    total = len(cases) * len(RULES) + len(loads) * len(OURS)
    found: _Found = {}
    for case, rule in product(cases, RULES):
        run.progress(f"{case.name}, {rule.name}", len(found), total)
        found[case.name, rule] = [serve(case, rule, trace, seed, count) for seed in seeds]
    for load, rule in product(loads, OURS):
        run.progress(f"{load.name}, {rule.name}", len(found), total)
        asked = count if run.quick else _USER_REQUESTS.get(load.workload, count)
        where = find_trace(run, load.workload)
        fares = [serve_users(load, rule, where, seed, asked) for seed in seeds]
        found[load.name, rule] = fares
    tight = [case.name for case in cases if case in BOTTLENECKS]
    return Finding(
        tables=(
            _table("decode is the bottleneck, % of the requests", found, cases, RULES),
            _table("the default, 2P:6D, % of the requests", found, loads, OURS),
        ),
        targets=(
            *(target for name in tight for target in _targets(name, found)),
            *(_user_target(load.name, rule, found) for load in loads for rule in OURS[1:]),
        ),
        notes=("Published: 4,183, 3,771 and 3,589 of 23,000 refused.",),
        keys={"row_06": _json(found)},
        draw=lambda axes: _draw(axes, found, tight),
    )


def _is_there(load: Load, run: Run) -> bool:
    """Of a trace only what was recorded goes by its name."""
    return load.workload == REASONING or find_trace(run, load.workload) is not None


def _table(
    title: str, found: _Found, cases: Sequence[Case | Load], rules: Sequence[Rule]
) -> ResultTable:
    rows = []
    for case, rule in product(cases, rules):
        fares = found[case.name, rule]
        cells = [show(percent(column(fares, c)), 1) for c in _COLUMNS[:3]]
        swings = [show(Estimate.of(column(fares, c))) for c in _COLUMNS[3:]]
        rows.append((case.name, rule.name, *cells, *swings))
    return ResultTable(
        title=f"simulated: row 6, {title}",
        columns=("case", "refused", "both targets", "refused, %", "wasted, %", "swing", "queue's"),
        texts=2,
        rows=tuple(rows),
    )


def _targets(case: str, found: _Found) -> list[Target]:
    targets = []
    for fewer, more, measure in (
        (CURRENT, AFTER, "refused"),
        (PREDICTED, CURRENT, "refused"),
        (CURRENT, AFTER, "wasted"),
        (PREDICTED, CURRENT, "swing"),
    ):
        gap = difference(column(found[case, more], measure), column(found[case, fewer], measure))
        targets.append(
            Target(
                promise=f"simulated, {case}: {fewer.name} has less {measure} than {more.name}",
                measured=f"by {show(gap, 3)}",
                held=gap.low > 0,
            )
        )
    return targets


def _user_target(load: str, rule: Rule, found: _Found) -> Target:
    gap = difference(column(found[load, rule], "good"), column(found[load, NEVER], "good"))
    return Target(
        promise=f"simulated, the default, {load}: as many or more within both targets, {rule.name}",
        measured=f"{show(gap, 3)} more",
        held=gap.high >= 0,
    )


def _json(found: _Found) -> dict[str, Json]:
    return {
        f"{case}: {rule.name}": {
            "simulated": True,
            **{name: as_json(Estimate.of(column(fares, name))) for name in _COLUMNS},
            "good_by_seed": [round(fare.good, 4) for fare in fares],
        }
        for (case, rule), fares in found.items()
    }


def _draw(axes: Axes, found: _Found, cases: Sequence[str]) -> None:
    for rule in RULES:
        goods = [percent(column(found[c, rule], "good")) for c in cases]
        names = [case.replace(", ", "\n") for case in cases]
        plot(axes, names, goods, marker="o", linestyle="", label=f"refused {rule.name}")
    axes.set(ylabel="within both targets, %", title="row 6, simulated")
    axes.legend(fontsize="x-small")


PART = Part(
    name="rejection",
    what="row 6: Mooncake's early rejection where decode is the bottleneck, and in the default",
    keys=("row_06",),
    run=_run,
)
