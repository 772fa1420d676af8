"""What `baton plan` shows: tables for people, one JSON object for scripts."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from cluster.tables import new_table, print_table
from simulator.plan.types import Affinity, Answer, Plan, Pool, Problem, Rated

_SHOWN = 5
_NUMBERS = (
    *("GPUs", "requests/s", "per GPU", "vs best"),
    *("TTFT p90 ms", "TPOT p90 ms", "cached", "refused"),
)


def show_answer(
    console: Console, model: str, problem: Problem, answer: Answer, notes: Sequence[str]
) -> None:
    """The best plans, the colocated one beside them, then what a buyer must know."""
    kinds = ", ".join(f"{offer.count} {offer.gpu}" for offer in problem.offers)
    console.print(
        f"\n[bold]simulated[/]: {escape(model)} on {problem.gpus} GPUs of {kinds}, targets"
        f" {problem.slo.ttft_s * 1e3:g} ms and {problem.slo.tpot_s * 1e3:g} ms for"
        f" {problem.share:.0%} of the requests, {problem.affinity} affinity",
        highlight=False,
        soft_wrap=True,
    )
    table = new_table(("plan (simulated)", "of it simulated"), _NUMBERS)
    rows = list(answer.best[:_SHOWN])
    if answer.colocated is not None:
        rows.append(answer.colocated)
    best = max((row.rps_per_gpu for row in rows), default=0.0)
    for row in rows:
        table.add_row(*_cells(row, best))
    print_table(console, table)
    if answer.margin is not None:
        console.print(f"the best plan is {answer.margin:.1%} above the next", highlight=False)
    for warning in answer.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"[dim]{escape(note)}[/]", highlight=False, soft_wrap=True)


def describe(plan: Plan) -> str:
    """One line for a plan."""
    if plan.decode is None:
        return f"colocated {_pool(plan.prefill)}"
    text = f"prefill {_pool(plan.prefill)} + decode {_pool(plan.decode)}"
    return f"{plan.copies} nodes of {text}" if plan.copies > 1 else text


def ratio(fleet: Plan) -> str:
    """Its workers: `3P:1D`, or `4` colocated ones."""
    if fleet.decode is None:
        return f"{fleet.prefill.workers}"
    return f"{fleet.prefill.workers}P:{fleet.decode.workers}D"


def _pool(pool: Pool) -> str:
    option = pool.option
    return f"{pool.workers} x {option.gpu} tp{option.tp} steps of {pool.step_tokens}"


def _cells(rated: Rated, best: float) -> tuple[str, ...]:
    goodput = rated.goodput
    least = ">= " if goodput.at_least else ""
    return (
        describe(rated.plan),
        ratio(rated.fleet),
        str(rated.plan.gpus),
        f"{least}{rated.rps:.2f}",
        f"{least}{rated.rps_per_gpu:.3f}",
        f"{rated.rps_per_gpu / best - 1:+.1%}",
        f"{goodput.ttft_p90_s * 1e3:.0f}",
        f"{goodput.tpot_p90_s * 1e3:.1f}",
        f"{goodput.hit_share:.0%}",
        f"{goodput.refused_share:.0%}",
    )


def answer_json(
    model: str, problem: Problem, answer: Answer, notes: Sequence[str]
) -> dict[str, object]:
    """The same, and all of it."""
    return {
        "simulated": True,
        "model": model,
        "gpus": problem.gpus,
        "gpu": {offer.gpu: offer.count for offer in problem.offers},
        "affinity": str(Affinity(problem.affinity)),
        "slo": {
            "ttft_ms": problem.slo.ttft_s * 1e3,
            "tpot_ms": problem.slo.tpot_s * 1e3,
            "share": problem.share,
        },
        "requests": len(problem.requests),
        "seed": problem.seed,
        "plans": [_rated_json(rated) for rated in answer.best],
        "colocated": _rated_json(answer.colocated) if answer.colocated is not None else None,
        "margin": answer.margin,
        "plans_simulated": answer.simulated,
        "warnings": list(answer.warnings),
        "notes": list(notes),
    }


def _rated_json(rated: Rated) -> dict[str, object]:
    plan, goodput = rated.plan, rated.goodput
    names = ("colocated",) if plan.decode is None else ("prefill", "decode")
    return {
        "copies": plan.copies,
        "simulated_workers": [pool.workers for pool in rated.fleet.pools],
        "gpus": plan.gpus,
        "requests_per_s": rated.rps,
        "requests_per_s_per_gpu": rated.rps_per_gpu,
        "at_least": goodput.at_least,
        "share": goodput.share,
        "ttft_p90_ms": goodput.ttft_p90_s * 1e3,
        "tpot_p90_ms": goodput.tpot_p90_s * 1e3,
        "hit_share": goodput.hit_share,
        "refused_share": goodput.refused_share,
        "pools": {
            name: {
                "gpu": pool.option.gpu,
                "tensor_parallel": pool.option.tp,
                "workers": pool.workers,
                "step_tokens": pool.step_tokens,
                "kv_tokens": pool.option.kv_tokens,
            }
            for name, pool in zip(names, plan.pools, strict=True)
        },
    }
