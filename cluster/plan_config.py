"""A cluster config from a plan."""

from pathlib import Path

import yaml

from cluster.plan_view import describe, ratio
from core.errors import InvalidRequest
from simulator.plan.trial import kv_bytes_per_s
from simulator.plan.types import Answer, Plan, Pool, Problem, Rated

_MIB = 1 << 20


def config_text(model: Path, problem: Problem, answer: Answer) -> str:
    """YAML of the best plan that a cluster can run: the engine computes on one GPU per worker, and
    all workers have one kind of it. Its `simulation` section lets `baton simulate` replay the plan.
    Raises InvalidRequest where there is none.
    """
    check_model(model)
    best = next((rated for rated in answer.best if rated.plan.can_run), None)
    if best is None:
        raise InvalidRequest(
            "--write: a worker runs on one GPU, of one kind in all pools, and no plan like that"
            " keeps the targets at any rate; the best one is "
            + (describe(answer.best[0].plan) if answer.best else "none")
        )
    tree = _tree(model, problem, best.plan)
    return "\n".join([*_comments(answer, best), yaml.safe_dump(tree, sort_keys=False)])


def check_model(model: Path) -> None:
    """Raises InvalidRequest unless workers can load it."""
    if not (model / "config.json").is_file():
        raise InvalidRequest("--write needs --model to be a checkpoint folder, which workers load")


def _what_cannot_run(plan: Plan) -> str:
    if any(pool.option.tp > 1 for pool in plan.pools):
        return "more than one GPU per worker"
    return "GPUs of two kinds"


def _comments(answer: Answer, chosen: Rated) -> list[str]:
    lines = [
        f"# Planned: {describe(chosen.plan)}",
        f"# Simulated on {ratio(chosen.fleet)}: {chosen.rps_per_gpu:.3f} requests/s per GPU",
    ]
    if chosen is not answer.best[0]:
        lines += [
            f"# The best plan, {describe(answer.best[0].plan)}, serves"
            f" {answer.best[0].rps_per_gpu:.3f}",
            f"# requests/s per GPU, simulated, but needs {_what_cannot_run(answer.best[0].plan)}.",
        ]
    return [*lines, *(f"# {warning}" for warning in answer.warnings)]


def _tree(model: Path, problem: Problem, plan: Plan) -> dict[str, object]:
    prefill, decode = plan.prefill, plan.decode
    if decode is None:
        raise InvalidRequest("a colocated plan has no cluster config")
    kv_tokens = min(pool.option.kv_tokens for pool in plan.pools)
    return {
        "model": {"path": str(model.absolute())},
        "engine": {
            "kv_memory_mb": kv_tokens * problem.kv_bytes_per_token // _MIB,
            "step_tokens": prefill.step_tokens,
            "chunk_tokens": prefill.step_tokens,
            "max_batch": problem.max_batch,
        },
        "prefill": {"workers": plan.copies * prefill.workers},
        "decode": {"workers": plan.copies * decode.workers},
        "resources": {"gpus": 1},
        "slo": {
            "ttft_ms": problem.slo.ttft_s * 1e3,
            "tpot_ms": problem.slo.tpot_s * 1e3,
        },
        "simulation": {
            "profile": f"roofline:{prefill.option.gpu}",
            "model": str(model.absolute()),
            "kv_tokens": kv_tokens,
            "kv_bytes_per_token": problem.kv_bytes_per_token,
            "pools": [
                _simulated(problem, "prefill", plan.copies, prefill),
                _simulated(problem, "decode", plan.copies, decode),
            ],
        },
    }


def _simulated(problem: Problem, role: str, copies: int, pool: Pool) -> dict[str, object]:
    return {
        "name": role,
        "role": role,
        "workers": copies * pool.workers,
        "step_tokens": pool.step_tokens,
        "chunk_tokens": pool.step_tokens,
        "nic_gb_per_s": kv_bytes_per_s(problem, pool.option) / 1e9,
    }
