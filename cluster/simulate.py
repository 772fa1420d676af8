"""`baton simulate`: from a config and a trace to tables, a plot and JSON.

Everything shown is simulated, and says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.long_work import bar, given_up
from cluster.plot import draw_plot
from cluster.tables import new_table, print_table
from core.estimate import percentile
from router.policies.base import Slo
from simulator.build import Settings, build_spec, describe_kv, describe_workers
from simulator.cluster import Cluster, Outcome
from simulator.spec import SimSpec
from simulator.summary import SHARES, Summary, summarise
from simulator.workload.build import Shaping
from simulator.workload.load import load_workload

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CDF_POINTS = 400
_WINDOWS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line asks for. `plot` None draws none."""

    trace: str
    rate_scale: float = 1.0
    requests: int | None = None
    max_prompt_tokens: int | None = None
    seed: int = 0
    only_json: bool = False
    plot: Path | None = None


def settings_of(config: ClusterConfig) -> Settings:
    """The sections that matter."""
    return Settings(
        simulation=config.simulation,
        engine=config.engine,
        router=config.router,
        slo=Slo(ttft_s=config.slo.ttft_ms / 1e3, tpot_s=config.slo.tpot_ms / 1e3),
        prefill_workers=config.prefill.workers,
        decode_workers=config.decode.workers,
        max_queued_tokens=config.prefill.max_queued_tokens,
        max_sequences=config.decode.max_sequences,
        transfer=config.transfer,
    )


def run_simulate(config: ClusterConfig, options: Options) -> None:
    """One run; the last line of standard output is the JSON object."""
    shaping = Shaping(
        seed=options.seed,
        rate_scale=options.rate_scale,
        requests=options.requests,
        max_prompt_tokens=options.max_prompt_tokens,
    )
    loaded = load_workload(options.trace, shaping)
    workload = loaded.workload
    settings = settings_of(config)
    spec = build_spec(settings, workload.block_size, options.seed)
    notes = [*loaded.notes, *describe_kv(settings, workload.requests)]
    with (
        given_up("the run was given up, nothing is known"),
        bar("simulating", len(workload.requests)) as report,
    ):
        outcome = Cluster(spec).run(workload.requests, report)
    summary = summarise(outcome, spec.slo, spec.gpus)
    if not options.only_json:
        console = Console()
        _show_run(console, spec, summary, outcome, workload.name)
        console.print(f"[dim]{describe_workers(settings)}[/]", highlight=False, soft_wrap=True)
        for note in notes:
            console.print(f"[dim]{note}[/]", highlight=False, soft_wrap=True)
    if options.plot is not None:
        title = (
            f"simulated: {workload.name} at {options.rate_scale:g}x its rate;"
            f" latencies {_of_served(summary)}"
        )
        print(draw_plot(options.plot, title, _run_panels(spec, outcome)), file=sys.stderr)
    result = _run_json(spec, summary, outcome, workload.name, options)
    said = {"workers": describe_workers(settings), "notes": notes}
    print(json.dumps(result | said), flush=True)


def _show_run(
    console: Console, spec: SimSpec, summary: Summary, outcome: Outcome, trace: str
) -> None:
    pools = ", ".join(f"{p.workers} {p.name}" for p in spec.pools)
    console.print(
        f"\n[bold]simulated[/]: {summary.requests} requests of {trace}, {summary.rate_per_s:.2f}/s,"
        f" on {pools} ({spec.gpus} GPUs); targets {spec.slo.ttft_s:g} s and"
        f" {spec.slo.tpot_s * 1e3:g} ms",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"latencies {_of_served(summary)}", highlight=False)
    latencies = new_table(
        ("simulated",), [f"p{share * 100:g}" for share in SHARES] + ["kept, of all"]
    )
    for name, values, kept, scale in (
        ("TTFT (s)", summary.ttft_s, summary.ttft_attainment, 1.0),
        ("TPOT (ms)", summary.tpot_s, summary.tpot_attainment, 1e3),
        ("hand-off pause (ms)", summary.transfer_s, None, 1e3),
    ):
        cells = [f"{value * scale:.3g}" for value in values] or ["-"] * len(SHARES)
        latencies.add_row(name, *cells, "" if kept is None else f"{kept:.1%}")
    print_table(console, latencies)
    totals = new_table(("simulated",), ("value",))
    for name, value in (
        ("both targets kept", f"{summary.attainment:.1%}"),
        ("goodput (requests/s per GPU)", f"{summary.goodput_per_gpu_s:.4g}"),
        ("output tokens/s", f"{summary.output_tokens_per_s:.0f}"),
        ("prompt tokens cached", f"{summary.hit_rate:.1%}"),
        *((f"busy: {name}", f"{share:.1%}") for name, share in outcome.busy_share.items()),
        ("preemptions", str(outcome.preemptions)),
        ("queued prompts moved", str(summary.prompts_moved)),
        ("prefixes fetched", str(summary.prefixes_fetched)),
        *((f"leases {name}", str(count)) for name, count in summary.leases.items() if count),
        *((f"requests {name}", str(count)) for name, count in sorted(summary.outcomes.items())),
    ):
        totals.add_row(name, value)
    console.print()
    print_table(console, totals)


def _of_served(summary: Summary) -> str:
    """Whose latencies are shown: who was not served has none."""
    counts = dict(summary.outcomes)
    served = f"of {counts.pop('ok', 0)} served"
    return ", ".join(
        [served, *(f"{count} {name.replace('_', ' ')}" for name, count in sorted(counts.items()))]
    )


def _run_json(
    spec: SimSpec, summary: Summary, outcome: Outcome, trace: str, options: Options
) -> dict[str, object]:
    names = [f"p{share * 100:g}" for share in SHARES]
    return asdict(summary) | {
        "simulated": True,
        "trace": trace,
        "rate_scale": options.rate_scale,
        "seed": options.seed,
        "gpus": spec.gpus,
        "latencies": _of_served(summary),
        "ttft_s": dict(zip(names, summary.ttft_s, strict=False)),
        "tpot_s": dict(zip(names, summary.tpot_s, strict=False)),
        "transfer_s": dict(zip(names, summary.transfer_s, strict=False)),
        "busy_share": outcome.busy_share,
        "preemptions": outcome.preemptions,
        "kv_moved_bytes": outcome.kv_moved_bytes,
    }


def _run_panels(spec: SimSpec, outcome: Outcome) -> dict[str, Callable[[Axes], None]]:
    done, asked = [r for r in outcome.records if r.outcome == "ok"], len(outcome.records)
    at_s = [r.at_s for r in done]
    ttfts, tpots = [r.ttft_s for r in done], [r.tpot_s * 1e3 for r in done]
    hits = [r.cached_tokens / r.prompt_tokens for r in done]
    slo = spec.slo
    return {
        "ttft": lambda axes: _over_time(axes, at_s, ttfts, "TTFT (s)", slo.ttft_s),
        "ttft_cdf": lambda axes: _cdf(axes, ttfts, asked, "TTFT (s)", slo.ttft_s),
        "tpot": lambda axes: _over_time(axes, at_s, tpots, "TPOT (ms)", slo.tpot_s * 1e3),
        "tpot_cdf": lambda axes: _cdf(axes, tpots, asked, "TPOT (ms)", slo.tpot_s * 1e3),
        "queues": lambda axes: _pools(axes, outcome, "queued_tokens", "prompt tokens queued"),
        "running": lambda axes: _pools(axes, outcome, "running", "sequences running"),
        "kv": lambda axes: _pools(axes, outcome, "kv_share", "KV in use (share)"),
        "busy": lambda axes: _pools(axes, outcome, "busy_share", "busy (share of time)"),
        "sizes": lambda axes: _pools(axes, outcome, "workers", "workers up"),
        "hits": lambda axes: _over_time(axes, at_s, hits, "prompt cached (share)", None),
    }


def _over_time(
    axes: Axes, at_s: Sequence[float], values: Sequence[float], label: str, target: float | None
) -> None:
    """Median and 90th percentile of equal windows of requests."""
    size = max(1, len(values) // _WINDOWS)
    starts = range(0, len(values), size)
    middles = [at_s[start] for start in starts]
    windows = [values[start : start + size] for start in starts]
    axes.plot(middles, [percentile(w, 0.5) for w in windows], label="median")
    axes.plot(middles, [percentile(w, 0.9) for w in windows], label="p90")
    if target is not None:
        axes.axhline(target, color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel("simulated time (s)")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)


def _cdf(axes: Axes, values: Sequence[float], asked: int, label: str, target: float) -> None:
    """Shares of all that `asked`: the curve ends below 1 by those that were not served."""
    ordered = sorted(values)
    step = max(1, len(ordered) // _CDF_POINTS)
    places = [*range(0, len(ordered), step), len(ordered) - 1] if ordered else []
    axes.plot([ordered[i] for i in places], [(i + 1) / asked for i in places])
    axes.axvline(target, color="gray", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(label)
    axes.set_ylabel(f"share of all {asked} requests")


def _pools(axes: Axes, outcome: Outcome, field: str, label: str) -> None:
    for name, samples in outcome.samples.items():
        axes.plot([s.at_s for s in samples], [getattr(s, field) for s in samples], label=name)
    axes.set_xlabel("simulated time (s)")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)
