"""The bench `validate`: its comparisons on cases whose answer is known."""

import gzip
import json
from pathlib import Path
from random import SystemRandom

import numpy as np
import pytest

from benchmarks.kept import Kept
from benchmarks.types import BenchFailed, Part, Run
from benchmarks.validate import curves, distserve, queueing, vllm_run
from benchmarks.validate.determinism import digest
from benchmarks.validate.rig import make_worker, simulate
from benchmarks.zygote import Zygote
from core.estimate import Estimate
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from simulator import cluster
from simulator.spec import PoolRole
from simulator.workload.types import SimRequest


def run_with(profiles: Path | None) -> Run:
    return Run(
        quick=True,
        device="cpu",
        progress=lambda text, done, total: None,
        zygote=Zygote(),
        kept=Kept(),
        profiles=profiles,
    )


@pytest.mark.parametrize("stages", [1, 2])
def test_a_simulated_queue_is_lindleys_request_by_request(stages: int) -> None:
    requests = queueing._arrivals(8.0, 200, stages, seed=3)
    took = [queueing._took_s(r, stages) for r in queueing._simulate(requests, stages)]
    assert took == pytest.approx(queueing._lindley(requests, stages))
    assert max(took) > 1.5 * min(took)


def test_lindleys_recursion_waits_for_the_stage_before_it() -> None:
    requests = [SimRequest(at_s, 100, 2) for at_s in (0.0, 0.01, 0.5)]
    assert queueing._lindley(requests, 2) == pytest.approx([0.1, 0.14, 0.1])


@pytest.mark.parametrize("part", [vllm_run.PART, curves.PART])
@pytest.mark.parametrize("given", [True, False])
def test_a_part_without_its_files_says_so_and_gives_no_number(
    tmp_path: Path, part: Part, given: bool
) -> None:
    finding = part.run(run_with(tmp_path if given else None))
    assert not finding.keys
    assert "--profiles" in finding.notes[0]
    assert [target.held for target in finding.targets] == [False]


LATENCY = FittedLatency(
    prefill=PrefillCurve(base_s=0.01, per_token_s=1e-4),
    decode=(DecodeCurve(base_s=0.02, per_sequence_s=1e-4),),
)


def test_a_run_that_the_model_describes_has_no_error() -> None:
    requests = [SimRequest(0.3 * i, 100 + 10 * i, 20) for i in range(30)]
    records = simulate(
        requests, {PoolRole.COLOCATED: make_worker(LATENCY, step_tokens=2048, max_batch=128)}
    )
    served = [
        vllm_run._Served(request, record.ttft_s, record.tpot_s, record.queue_s)
        for request, record in zip(requests, records, strict=True)
    ]
    assert vllm_run._compare(served, LATENCY).median == pytest.approx(0, abs=1e-9)
    slow = FittedLatency(prefill=PrefillCurve(base_s=0.02, per_token_s=2e-4), decode=LATENCY.decode)
    assert vllm_run._compare(served, slow).median > 0.5


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x-vllm-requests.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps({"queued_ts": 1.0}).encode()))
    with pytest.raises(BenchFailed, match="no record of a vLLM run"):
        vllm_run._read(file)


def test_curves_that_follow_the_fit_are_met_out_of_sample(tmp_path: Path) -> None:
    folder = tmp_path / "dynamo-planner"
    folder.mkdir()
    lengths = np.arange(100, 8000, 500)
    batches, context = np.repeat([1, 8, 32, 64], 2), np.tile([500.0, 4000.0, 4000.0, 500.0], 2)
    itl_ms = 5 + 0.1 * batches + 1e-4 * batches * context
    tp = np.array([[1]])
    np.savez(
        folder / "h200_x_prefill.npz",
        prefill_isl=[lengths],
        prefill_ttft=[10 + 0.02 * lengths + 1e-6 * lengths**2],
        tp=tp,
    )
    np.savez(
        folder / "h200_x_decode.npz",
        y_context_length=[context],
        z_itl=[itl_ms],
        z_thpt_per_gpu=[batches / itl_ms * 1e3],
        max_kv_tokens=[[10**6]],
        tp=tp,
    )
    finding = curves.PART.run(run_with(tmp_path))
    fitted = [row for row in finding.tables[0].rows if row[0] == "fitted"]
    assert {cell for row in fitted for cell in row[2:]} == {"0.0%"}


def test_a_prefill_worker_of_two_gpus_keeps_the_target_where_one_cannot() -> None:
    def share(plan: distserve._Plan) -> float:
        records = distserve._simulate(plan, 1.0, seed=0)
        return sum(record.ttft_s <= 0.2 for record in records) / len(records)

    assert share(distserve._Plan(2, 1)) > 0.9 > share(distserve._Plan(1, 1))


@pytest.mark.parametrize(("others", "held"), [(1.6, True), (1.0, False)])
def test_the_rate_of_the_best_plan_is_the_mean_of_ten_seeds_and_held_by_it(
    others: float, *, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two seeds alone both miss the published rate, their mean does not."""

    def rate(plan: distserve._Plan, seed: int) -> float:
        return {0: 1.2, 1: 2.0}.get(seed, others) if plan == distserve._BEST else 0.1

    point = distserve._Point(**dict.fromkeys(("ttft", "tpot", "both"), Estimate(1.0, 0.0)))
    monkeypatch.setattr(distserve, "_highest_rate", rate)
    monkeypatch.setattr(distserve, "_attainment", lambda rate, seeds: point)
    finding = distserve.PART.run(run_with(None))
    assert finding.keys["distserve_case"] == pytest.approx((3.2 + 8 * others) / 10)
    assert finding.targets[0].held == held
    assert "+-" in finding.targets[0].measured


def test_a_run_is_its_seeds_alone() -> None:
    assert digest(0, 30) == digest(0, 30) != digest(1, 30)


class Undetermined(SystemRandom):
    def __init__(self, seed: float = 0) -> None:
        super().__init__()


def test_a_router_that_draws_otherwise_each_time_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "Random", Undetermined)
    assert len({digest(0, 60) for _ in range(3)}) > 1
