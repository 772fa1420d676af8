"""Row 12: TetriInfer's five mixes of lengths (2401.11181, section 5), against servers that compute
prompts beside answers, in chunks or whole.

    light / heavy prompts    up to 512 tokens / more         L/HP
    light / heavy answers    up to 128 tokens / more         L/HD

It asked 128 requests of OPT-13B on four V100 (tp2), its lengths ShareGPT's of each class. Here they
are drawn evenly from each class, up to 1,024 tokens in and 900 out (OPT reads 2,048); workers are
DistServe's fits of OPT-13B tp2 on A100 with the KV room of two V100. One worker prefills and one
decodes; against them stand two workers that do both, and one alone, as its gains over vLLM (times
of a request nearly halved) look like a comparison with half the GPUs. All requests come at once.

A prefill worker is paid until its last prompt is done, as it then takes another role; others until
their last answer is. Its 200-token length predictor is not needed: there is one decode worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import as_json, plot, ratio, seeds_of, show
from benchmarks.types import Finding, Json, Part, ResultTable, Run, Target
from benchmarks.validate.rig import Workers, run_cluster
from core.estimate import Estimate
from simulator.job import Record
from simulator.profiles.published import distserve_latency
from simulator.spec import PoolRole
from simulator.worker import WorkerSpec
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_REQUESTS = 128
_LIGHT_PROMPT, _HEAVY_PROMPT = (32, 512), (513, 1024)
_LIGHT_ANSWER, _HEAVY_ANSWER = (16, 128), (129, 900)
_KV_TOKENS = 39_000
"""Of 2 x 32 GB, 90 % less 26 GB of weights, at 819,200 bytes per token."""
_WHOLE = 10**9
_CHUNK = 512

Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Classes of prompts and answers that are drawn from. `published` is TetriInfer's gain in work
    per cost over vLLM, where its text gives one.
    """

    name: str
    prompts: tuple[Span, ...]
    answers: tuple[Span, ...]
    published: float | None


MIXES = (
    Mix(name="LPLD", prompts=(_LIGHT_PROMPT,), answers=(_LIGHT_ANSWER,), published=None),
    Mix(name="LPHD", prompts=(_LIGHT_PROMPT,), answers=(_HEAVY_ANSWER,), published=2.4),
    Mix(name="HPLD", prompts=(_HEAVY_PROMPT,), answers=(_LIGHT_ANSWER,), published=0.86),
    Mix(name="HPHD", prompts=(_HEAVY_PROMPT,), answers=(_HEAVY_ANSWER,), published=1.1),
    Mix(
        name="Mixed",
        prompts=(_LIGHT_PROMPT, _HEAVY_PROMPT),
        answers=(_LIGHT_ANSWER, _HEAVY_ANSWER),
        published=1.9,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Means of a run: seconds to the first and to the last token, and worker-seconds paid."""

    ttft_s: float
    whole_s: float
    paid_s: float

    @property
    def work_per_cost(self) -> float:
        """Speed of a request by what all of them cost."""
        return 1 / (self.whole_s * self.paid_s)


def _worker(step_tokens: int) -> WorkerSpec:
    latency = distserve_latency("opt-13b", 2)
    return WorkerSpec(
        latency=replace(latency, mixed_saves_s=latency.decode[0].base_s),
        kv_blocks=_KV_TOKENS // 16,
        block_size=16,
        step_tokens=step_tokens,
        max_batch=256,
        kv_bytes_per_token=819_200,
        nic_bytes_per_s=25e9,
        gpus=2,
    )


SPLIT = "split"
SYSTEMS = {
    SPLIT: (
        Workers(PoolRole.PREFILL, 1, _worker(_CHUNK)),
        Workers(PoolRole.DECODE, 1, _worker(_CHUNK)),
    ),
    "one, whole prompts": (Workers(PoolRole.COLOCATED, 1, _worker(_WHOLE)),),
    "two, whole prompts": (Workers(PoolRole.COLOCATED, 2, _worker(_WHOLE)),),
    "two, chunked": (Workers(PoolRole.COLOCATED, 2, _worker(_CHUNK)),),
}
_OTHERS = tuple(name for name in SYSTEMS if name != SPLIT)


def draw_requests(mix: Mix, seed: int, count: int = _REQUESTS) -> list[SimRequest]:
    """All at once."""
    random = Random(seed)
    return [
        SimRequest(
            0.0,
            random.randint(*random.choice(mix.prompts)),
            random.randint(*random.choice(mix.answers)),
        )
        for _ in range(count)
    ]


def cost_of(records: Sequence[Record]) -> Cost:
    """Every worker is paid from 0 to the last thing it did."""
    paid: dict[str, float] = {}
    for record in records:
        prefilled_s = record.first_s
        paid[record.prefill_worker] = max(paid.get(record.prefill_worker, 0.0), prefilled_s)
        if record.decode_worker:
            paid[record.decode_worker] = max(paid.get(record.decode_worker, 0.0), record.end_s)
    return Cost(
        ttft_s=fmean(record.ttft_s for record in records),
        whole_s=fmean(record.end_s - record.at_s for record in records),
        paid_s=sum(paid.values()),
    )


def simulate_mix(mix: Mix, system: str, seed: int, count: int = _REQUESTS) -> Cost:
    """One system, one draw."""
    outcome = run_cluster(
        draw_requests(mix, seed, count), SYSTEMS[system], max_tokens=_HEAVY_ANSWER[1], seed=seed
    )
    return cost_of(outcome.records)


# -- the part -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Gain:
    """The split pair by another system, seed by seed: below 1 is less."""

    ttft: Estimate
    whole: Estimate
    paid: Estimate
    work: Estimate


def _run(run: Run) -> Finding:
    seeds = seeds_of(run.quick)
    gains: dict[tuple[str, str], _Gain] = {}
    for i, mix in enumerate(MIXES):
        run.progress(mix.name, i, len(MIXES))
        costs = {name: [simulate_mix(mix, name, seed) for seed in seeds] for name in SYSTEMS}
        for other in _OTHERS:
            gains[mix.name, other] = _gain(costs[SPLIT], costs[other])
    loses = {other: gains["HPLD", other].work for other in _OTHERS}
    best = {
        other: max(MIXES, key=lambda m: gains[m.name, other].work.mean).name for other in _OTHERS
    }
    return Finding(
        tables=tuple(_table(other, gains) for other in _OTHERS),
        targets=(
            *(
                Target(
                    promise=f"simulated: of the mixes LPHD gains most against {other}",
                    measured=best[other],
                    held=best[other] == "LPHD",
                )
                for other in _OTHERS
            ),
            *(
                Target(
                    promise=f"simulated: HPLD loses against {other}",
                    measured=f"{show(gain)} times the work per cost",
                    held=gain.high < 1,
                )
                for other, gain in loses.items()
            ),
        ),
        notes=(
            "Work per cost: 1 / (mean time of a request x worker-seconds paid). TetriInfer's own"
            " measure of cost may differ.",
        ),
        keys={
            "row_12": {
                mix.name: {other: _json(gains[mix.name, other]) for other in _OTHERS}
                for mix in MIXES
            }
        },
        draw=lambda axes: _draw(axes, gains),
    )


def _gain(mine: list[Cost], others: list[Cost]) -> _Gain:
    return _Gain(
        ttft=ratio([c.ttft_s for c in mine], [c.ttft_s for c in others]),
        whole=ratio([c.whole_s for c in mine], [c.whole_s for c in others]),
        paid=ratio([c.paid_s for c in mine], [c.paid_s for c in others]),
        work=ratio([c.work_per_cost for c in mine], [c.work_per_cost for c in others]),
    )


def _table(other: str, gains: dict[tuple[str, str], _Gain]) -> ResultTable:
    return ResultTable(
        title=f"simulated: row 12, a prefill and a decode worker by colocated ones ({other})",
        columns=("mix", "TTFT", "whole", "paid", "work per cost", "published", "outcome"),
        texts=1,
        rows=tuple(
            (
                mix.name,
                show(gain.ttft),
                show(gain.whole),
                show(gain.paid),
                show(gain.work),
                "-" if mix.published is None else f"{mix.published:g}",
                _outcome(gain.work),
            )
            for mix in MIXES
            for gain in [gains[mix.name, other]]
        ),
    )


def _outcome(work: Estimate) -> str:
    if work.low > 1:
        return "wins"
    return "LOSES" if work.high < 1 else "even"


def _json(gain: _Gain) -> dict[str, Json]:
    return {
        "simulated": True,
        "ttft": as_json(gain.ttft),
        "whole": as_json(gain.whole),
        "paid": as_json(gain.paid),
        "work_per_cost": as_json(gain.work),
        "outcome": _outcome(gain.work),
    }


def _draw(axes: Axes, gains: dict[tuple[str, str], _Gain]) -> None:
    for other in _OTHERS:
        work = [gains[mix.name, other].work for mix in MIXES]
        plot(axes, [mix.name for mix in MIXES], work, fmt="o", capsize=4, label=f"by {other}")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(ylabel="work per cost, ratio", title="row 12, simulated")
    axes.legend()


PART = Part(
    name="mixes",
    what="row 12: TetriInfer's five mixes, against colocated workers, chunked and not",
    keys=("row_12",),
    run=_run,
)
