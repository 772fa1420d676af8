"""The search as a whole, on problems small enough to reason about."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.policies.base import Slo
from simulator.plan.search import search
from simulator.plan.types import Affinity, Answer, Offer, Plan, Problem, Rated
from tests.simulator.plan.problems import asked, option, problem


def _search(asked_for: Problem, *, processes: int = 1, rate_rps: float | None = None) -> Answer:
    return search(
        asked_for,
        processes=processes,
        progress=lambda text, done, total: None,
        rate_rps=rate_rps,
    )


LONG_PROMPTS = problem(
    option(), gpus=2, prompt=4000, output=60, slo=Slo(ttft_s=1.5, tpot_s=0.016), chunks=(2048,)
)
"""Each chunk of a prompt delays the answers that run beside it beyond their target."""
SHORT_PROMPTS = problem(
    option(per_context_s=5e-6), gpus=2, prompt=50, output=60, slo=Slo(ttft_s=0.2, tpot_s=0.015)
)


def test_long_prompts_and_a_tight_tpot_pay_for_disaggregation() -> None:
    answer = _search(LONG_PROMPTS)
    assert answer.warnings == ()
    assert answer.colocated is None or (
        answer.best[0].rps_per_gpu > 1.1 * answer.colocated.rps_per_gpu
    )


def test_short_prompts_do_not_and_the_answer_says_so() -> None:
    answer = _search(SHORT_PROMPTS)
    (warning,) = answer.warnings
    assert warning.startswith("disaggregation does not pay here: simulated")
    assert "50 prompt tokens and generates 60" in warning
    assert answer.colocated is not None


def test_a_load_that_one_worker_serves_does_not_pay_and_the_answer_says_so() -> None:
    mild = replace(LONG_PROMPTS, slo=Slo(ttft_s=3.0, tpot_s=0.2))
    warnings = _search(mild, rate_rps=0.1).warnings
    assert any("at 0.1 requests/s disaggregation does not pay" in text for text in warnings)
    assert any("2 GPUs, and colocated workers 1" in text for text in warnings)


def test_targets_that_nothing_keeps_give_no_plan_and_a_warning() -> None:
    hopeless = replace(SHORT_PROMPTS, slo=Slo(ttft_s=1e-4, tpot_s=0.03))
    answer = _search(hopeless)
    assert (answer.best, answer.colocated) == ((), None)
    assert "no disaggregated plan keeps the targets" in answer.warnings[0]


@pytest.mark.parametrize(
    ("cluster", "fits"),
    [
        (problem(option(), gpus=1), "on 1 GPUs: the smallest that hold the model take 1 each"),
        (problem(option(4), gpus=7), "on 7 GPUs: the smallest that hold the model take 4 each"),
        (
            problem(option(), gpus=8, node_gpus=1, affinity=Affinity.LOW),
            "on the GPUs of one node: the smallest",
        ),
    ],
)
def test_too_few_gpus_for_both_phases_are_not_blamed_on_the_targets(
    cluster: Problem, fits: str
) -> None:
    (warning,) = _search(replace(cluster, slo=Slo(ttft_s=3.0, tpot_s=0.2))).warnings
    assert "a prefill and a decode worker do not fit" in warning
    assert fits in warning
    assert warning.endswith("; colocated workers keep the targets")


def test_a_rate_that_these_gpus_do_not_serve_is_said_to_be_too_high() -> None:
    warnings = _search(LONG_PROMPTS, rate_rps=1000.0).warnings
    (said,) = [text for text in warnings if "too few for 1000 requests/s" in text]
    assert "the best plan serves" in said
    assert not any("too few" in text for text in _search(LONG_PROMPTS, rate_rps=0.01).warnings)


def test_one_and_two_processes_give_one_answer() -> None:
    small = replace(SHORT_PROMPTS, requests=asked(60, 50, 20), least_requests=60)
    assert _search(small, processes=2) == _search(small)


def test_plans_too_fast_for_a_run_are_said_to_serve_at_least_so_much() -> None:
    fast = replace(SHORT_PROMPTS, run_s=20.0, least_requests=50, most_requests=60)
    answer = _search(fast)
    assert all(rated.goodput.at_least for rated in answer.best)
    (warning,) = answer.warnings
    assert "at most 60 requests" in warning


def test_plans_that_one_fleet_stands_for_are_simulated_once_and_serve_the_same() -> None:
    asked_for = replace(LONG_PROMPTS, gpus=100, requests=asked(60, 4000, 60), least_requests=60)
    answer = _search(replace(asked_for, offers=(Offer(gpu="h100", count=100),)))
    by_fleet: dict[Plan, list[Rated]] = {}
    for rated in answer.best:
        by_fleet.setdefault(rated.fleet, []).append(rated)
    shared = [plans for plans in by_fleet.values() if len(plans) > 1]
    assert shared
    assert all(one.goodput is plans[0].goodput for plans in shared for one in plans)


def test_a_plan_counts_whom_the_router_refuses_as_missed_as_its_cluster_would() -> None:
    crowded = replace(LONG_PROMPTS, requests=asked(200, 4000, 60), least_requests=200)
    served = _search(crowded).best[0].goodput
    waiting = _search(replace(crowded, router=RouterConfig(admission="off"))).best[0].goodput
    assert served.refused_share > 0
    assert served.refused_share + served.share <= 1
    assert served.rps > waiting.rps
    assert waiting.refused_share == 0


def test_a_plan_that_a_cluster_can_be_configured_for_is_among_those_simulated() -> None:
    tight = Slo(ttft_s=0.22, tpot_s=0.1)  # one GPU takes 0.2 s for a prompt
    kinds = [option(tp) for tp in (1, 2, 4)]
    best = _search(problem(*kinds, gpus=8, prompt=2000, output=20, count=60, slo=tight)).best
    assert not best[0].plan.can_run
    assert any(rated.plan.can_run for rated in best)


def test_lean_plans_are_tried_beside_those_whose_phases_balance() -> None:
    best = _search(replace(LONG_PROMPTS, gpus=8, offers=(Offer(gpu="h100", count=8),))).best
    shapes = [(r.plan.prefill.workers, r.plan.decode.workers) for r in best if r.plan.decode]
    assert (2, 6) in shapes
    assert max(prefills for prefills, _ in shapes) > 2
