"""Row 10: how many prefill workers per decode worker (P/D-Serve, 2408.08147, section 3).

It equalises what the pools can do: n_p b_p / T_p = n_d b_d / T_d, so

    n_p / n_d = (b_d T_p) / (b_p T_d)

with T_p the time of a batch of b_p prompts and T_d that of whole answers in a batch of b_d. Here
b_p is 1, and b_d the most sequences that keep the TPOT target and fit into memory. All ways to
split six workers are simulated; the formula may be off by one worker.

Its own services and NPUs are not published. The two services are ours (3,000 tokens in and 350 out
at 40 ms, 7,800 and 700 at 20 ms), the worker is Llama-3-70B on four H100: sums of measured vLLM
kernels (NVIDIA's aiconfigurator, systems/data) fitted to lines, and 15 % on top for what is not in
kernels.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from benchmarks.reproduce.cases import as_json, difference, kernel_latency, plot, seeds_of, show
from benchmarks.types import Finding, Part, ResultTable, Run, Target
from benchmarks.validate.rig import Workers, run_cluster
from core.estimate import Estimate
from engine.latency.base import LatencyModel, StepShape
from router.policies.base import Slo
from simulator.plan.trial import highest
from simulator.plan.types import Goodput
from simulator.spec import PoolRole
from simulator.summary import SHARES, summarise
from simulator.worker import WorkerSpec
from simulator.workload.arrivals import Constant, draw_arrivals
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WORKERS = 6
_SHARE = 0.9
_LATENCY = kernel_latency((8.95, 0.03478, 1.29e-6), (13.63, 0.0111, 2.61e-5))
_KV_TOKENS = 448_000
"""Of 4 x 80 GB, 90 % less 141 GB of weights, at 327,680 bytes per token."""
_WORKER = WorkerSpec(
    latency=_LATENCY,
    kv_blocks=_KV_TOKENS // 16,
    block_size=16,
    step_tokens=8192,
    max_batch=1024,
    kv_bytes_per_token=327_680,
    nic_bytes_per_s=4 * 50e9,
    gpus=4,
)
_PATIENCE = 5
"""The TTFT target, in times of a prompt alone."""
_STAYS = 4
_WARM_UP = 0.3
_WIDTH = 0.04


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Requests of equal lengths, and their targets."""

    name: str
    prompt_tokens: int
    output_tokens: int
    tpot_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """What the formula says. `ratio` is n_p / n_d."""

    prefill_s: float
    batch: int
    answer_s: float

    @property
    def ratio(self) -> float:
        return self.batch * self.prefill_s / self.answer_s

    def prefills(self, workers: int) -> int:
        """Of so many workers, those that prefill: at least one of each."""
        return min(workers - 1, max(1, round(workers * self.ratio / (1 + self.ratio))))

    def rate_rps(self, prefills: int, decodes: int) -> float:
        """What the scarcer pool can do."""
        return min(prefills / self.prefill_s, decodes * self.batch / self.answer_s)


SERVICES = (
    Service(name="A", prompt_tokens=3000, output_tokens=350, tpot_s=0.040),
    Service(name="B", prompt_tokens=7800, output_tokens=700, tpot_s=0.020),
)


def formula(service: Service, latency: LatencyModel, kv_tokens: int) -> Ratio:
    """Pure. The batch is sought at the contexts' mean, in memory at their longest mean."""
    context = service.prompt_tokens + service.output_tokens / 2
    batch = max(1, int(kv_tokens / context))
    while batch > 1 and latency.decode_run_s(batch, int(batch * context), 1) > service.tpot_s:
        batch -= 1
    return Ratio(
        prefill_s=latency.step_s(StepShape([(0, service.prompt_tokens)])),
        batch=batch,
        answer_s=service.output_tokens * latency.decode_run_s(batch, int(batch * context), 1),
    )


def goodput_rps(service: Service, expected: Ratio, prefills: int, decodes: int, seed: int) -> float:
    """The highest rate at which 90 % keep both targets, of a bisection on common draws."""
    slo = Slo(ttft_s=_PATIENCE * expected.prefill_s, tpot_s=service.tpot_s)
    pools = (
        Workers(PoolRole.PREFILL, prefills, _WORKER),
        Workers(PoolRole.DECODE, decodes, _WORKER),
    )
    span_s = _STAYS * service.output_tokens * service.tpot_s
    gaps = draw_arrivals(Constant(1.0), 4096, Random(seed))

    def at(rps: float) -> Goodput:
        count = min(len(gaps), max(150, int(rps * span_s)))
        requests = [
            SimRequest(t / rps, service.prompt_tokens, service.output_tokens) for t in gaps[:count]
        ]
        outcome = run_cluster(
            requests, pools, slo=slo, max_tokens=2 * service.output_tokens, seed=seed
        )
        summary = summarise(outcome, slo, 1, warm_up=_WARM_UP)
        p90 = SHARES.index(_SHARE)
        return Goodput(
            rps=rps,
            share=summary.attainment,
            ttft_p90_s=summary.ttft_s[p90],
            tpot_p90_s=summary.tpot_s[p90],
            hit_share=summary.hit_rate,
        )

    guess_rps = 0.75 * expected.rate_rps(prefills, decodes)
    return highest(at, share=_SHARE, guess_rps=guess_rps, width=_WIDTH).rps


# -- the part -----------------------------------------------------------------------------------


def _run(run: Run) -> Finding:
    seeds = seeds_of(run.quick)
    services = SERVICES[1:] if run.quick else SERVICES
    found: dict[str, dict[int, list[float]]] = {}
    expected = {s.name: formula(s, _LATENCY, _KV_TOKENS) for s in services}
    for i, service in enumerate(services):
        splits = found[service.name] = {}
        for prefills in range(1, _WORKERS):
            done = i * (_WORKERS - 1) + prefills - 1
            run.progress(
                f"service {service.name}, {prefills}P{_WORKERS - prefills}D",
                done,
                len(services) * (_WORKERS - 1),
            )
            splits[prefills] = [
                goodput_rps(service, expected[service.name], prefills, _WORKERS - prefills, seed)
                for seed in seeds
            ]
    best = {name: _argmax(splits) for name, splits in found.items()}
    return Finding(
        tables=tuple(_table(s, expected[s.name], found[s.name]) for s in services),
        targets=tuple(
            Target(
                promise=f"simulated, service {name}: the formula's split is the best one, or"
                " one worker beside it",
                measured=f"formula {_name(expected[name].prefills(_WORKERS))}, best {_name(split)}",
                held=abs(split - expected[name].prefills(_WORKERS)) <= 1,
            )
            for name, split in best.items()
        ),
        notes=(
            "Published: the right ratio gives at least 60 % more throughput (P/D-Serve, its own"
            " services and NPUs).",
        ),
        keys={
            "row_10": {
                name: {
                    "simulated": True,
                    "formula_ratio": expected[name].ratio,
                    "formula_prefill_workers": expected[name].prefills(_WORKERS),
                    "best_prefill_workers": best[name],
                    "best_by_worst": statistics.fmean(splits[best[name]])
                    / max(1e-9, min(map(statistics.fmean, splits.values()))),
                    "requests_per_s": {
                        _name(split): as_json(Estimate.of(rates)) for split, rates in splits.items()
                    },
                }
                for name, splits in found.items()
            }
        },
        draw=lambda axes: _draw(axes, found),
    )


def _argmax(splits: dict[int, list[float]]) -> int:
    return max(splits, key=lambda split: statistics.fmean(splits[split]))


def _name(prefills: int) -> str:
    return f"{prefills}P{_WORKERS - prefills}D"


def _table(service: Service, expected: Ratio, splits: dict[int, list[float]]) -> ResultTable:
    best = splits[_argmax(splits)]
    return ResultTable(
        title=f"simulated: row 10, service {service.name}, {service.prompt_tokens} tokens in and"
        f" {service.output_tokens} out, {1e3 * service.tpot_s:g} ms; formula n_p/n_d ="
        f" {expected.ratio:.2f}: {_name(expected.prefills(_WORKERS))}",
        columns=("split", "formula, requests/s", "requests/s", "less than the best"),
        texts=1,
        rows=tuple(
            (
                _name(split),
                f"{expected.rate_rps(split, _WORKERS - split):.2f}",
                show(Estimate.of(rates)),
                show(difference(best, rates)),
            )
            for split, rates in splits.items()
        ),
    )


def _draw(axes: Axes, found: dict[str, dict[int, list[float]]]) -> None:
    for name, splits in found.items():
        estimates = [Estimate.of(rates) for rates in splits.values()]
        plot(axes, list(map(_name, splits)), estimates, marker="o", label=f"service {name}")
    axes.set(ylabel="goodput, requests/s", title="row 10, simulated")
    axes.legend()


PART = Part(
    name="ratio",
    what="row 10: the P/D ratio formula of P/D-Serve against all splits of six workers",
    keys=("row_10",),
    run=_run,
)
