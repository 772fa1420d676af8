"""What stands for a large plan, and whether it stands for it well."""

from dataclasses import replace

import pytest

from router.config import RouterConfig
from router.policies.base import Slo
from simulator.plan.combine import Candidate
from simulator.plan.fleet import find_fleet, phase_run_s, shrink, whole_run_s
from simulator.plan.search import search
from simulator.plan.trial import find_goodput, mean_prefill_s, plan_setup
from simulator.plan.types import Goodput, Plan, Pool, Problem, Rated, scale_of
from tests.simulator.plan.problems import option, problem

SLOW = 1.0
"""Requests/s of so few that a run of eight workers is affordable."""


def _plan(prefills: int, decodes: int) -> Plan:
    pool = Pool(option=option(), step_tokens=512, workers=prefills)
    return Plan(prefill=pool, decode=replace(pool, workers=decodes))


def _workers(plan: Plan) -> list[int]:
    return [pool.workers for pool in plan.pools]


@pytest.mark.parametrize(
    ("workers", "fleet"),
    [((3, 1), [3, 1]), ((24, 8), [6, 2]), ((27, 5), [6, 1]), ((21, 11), [4, 2]), ((9, 15), [3, 5])],
)
def test_at_most_eight_workers_of_nearly_the_same_ratio(
    workers: tuple[int, int], fleet: list[int]
) -> None:
    assert _workers(find_fleet(problem(option()), _plan(*workers), SLOW)) == fleet


def test_a_ratio_too_far_from_one_for_eight_takes_more() -> None:
    fleet = find_fleet(problem(option()), _plan(30, 2), SLOW)
    assert _workers(fleet) == [15, 1]


def test_rates_too_high_for_eight_take_fewer() -> None:
    lasting = replace(problem(option()), run_s=20.0)
    assert _workers(find_fleet(lasting, _plan(16, 16), 32 * 30.0)) == [2, 2]


def test_colocated_workers_are_counted_by_the_fleet() -> None:
    plan = replace(_plan(20, 1), decode=None)
    fleet = shrink(plan, 8)
    assert _workers(fleet) == [8]
    assert scale_of(plan, fleet) == 2.5


def test_a_plan_serves_what_its_scarcer_pool_has_fleets_for() -> None:
    served = Goodput(rps=10.0, share=0.9, ttft_p90_s=0.1, tpot_p90_s=0.01, hit_share=0.0)
    plan = replace(_plan(27, 5), copies=2)
    rated = Rated(plan=plan, fleet=_plan(6, 1), goodput=served)
    assert rated.rps == 10.0 * 4.5 * 2
    assert rated.rps_per_gpu == 10.0 * 4.5 / 32


def test_runs_last_three_stays_and_a_phase_alone_no_more_than_ten() -> None:
    asked = replace(problem(option(), output=100, slo=Slo(ttft_s=1.0, tpot_s=0.1)), run_s=20.0)
    assert whole_run_s(asked) == pytest.approx(33.0)
    assert phase_run_s(asked, 1.0, 10.0) == pytest.approx(30.0)
    assert phase_run_s(asked, 1.0, 1.0) == pytest.approx(10.0)
    assert phase_run_s(asked, 200.0, 1.0) == pytest.approx(5.0)


BALANCED = replace(problem(option(), gpus=4, output=100), run_s=20.0, width=0.03)


def _goodput_per_gpu(asked: Problem, prefills: int, decodes: int) -> float:
    plan = _plan(prefills, decodes)
    pools = [replace(pool, option=asked.options[0]) for pool in plan.pools]
    plan = Plan(prefill=pools[0], decode=pools[1])
    candidate = Candidate(plan, 6.0 * prefills)
    fleet = find_fleet(asked, plan, candidate.rps)
    goodput = find_goodput(asked, plan_setup(asked, fleet, candidate.rps / scale_of(plan, fleet)))
    return Rated(plan=plan, fleet=fleet, goodput=goodput).rps_per_gpu


def test_four_gpus_and_sixteen_serve_the_same_per_gpu_and_no_more_than_prefill_allows() -> None:
    apart = RouterConfig(admission="off", local_prefill=False)
    asked = replace(BALANCED, router=apart)  # who refuses, or prefills elsewhere, is allowed more
    four, sixteen = (_goodput_per_gpu(asked, *shape) for shape in ((3, 1), (12, 4)))
    assert four == pytest.approx(sixteen, rel=0.15)
    allowed = 3 / 4 / mean_prefill_s(asked, asked.options[0], 512)
    assert 0.5 * allowed < four <= allowed
    assert 0.5 * allowed < sixteen <= allowed


def test_searches_of_four_gpus_and_sixteen_agree_per_gpu() -> None:
    four, sixteen = (
        search(replace(BALANCED, gpus=gpus), progress=lambda text, done, total: None)
        for gpus in (4, 16)
    )
    assert four.best[0].rps_per_gpu == pytest.approx(sixteen.best[0].rps_per_gpu, rel=0.15)
    assert sum(_workers(sixteen.best[0].fleet)) <= 8
