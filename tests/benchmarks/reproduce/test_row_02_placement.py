"""Row 2: what is drawn and posed, and one small application from the search to its rates."""

from dataclasses import replace
from statistics import fmean

import pytest

from benchmarks.reproduce.row_02_placement import (
    APPLICATIONS,
    describe,
    draw_requests,
    fare,
    options_of,
    pose,
    reads_twice,
    unchunked,
)
from engine.latency.base import StepShape
from simulator.plan.types import Affinity, Goodput

CODE = APPLICATIONS[2]
GOODPUT = Goodput(rps=4.0, share=1.0, ttft_p90_s=0.1, tpot_p90_s=0.1, hit_share=0.0)


def test_drawn_lengths_have_the_published_means() -> None:
    requests = draw_requests(CODE, seed=1, count=4000)
    assert fmean(r.prompt_tokens for r in requests) == pytest.approx(171, rel=0.05)
    assert fmean(r.output_tokens for r in requests) == pytest.approx(98, rel=0.05)


def test_a_step_of_both_kinds_is_cheaper_than_two_for_searched_plans_alone() -> None:
    mixed, prompt, decode = (
        StepShape([(0, 100)], 4, 400),
        StepShape([(0, 100)]),
        StepShape([], 4, 400),
    )
    searched = next(o for o in options_of(CODE.model) if o.tp == CODE.baseline_tp).latency
    bare = unchunked(CODE, GOODPUT).plan.prefill.option.latency
    assert searched.step_s(mixed) < searched.step_s(prompt) + searched.step_s(decode)
    assert bare.step_s(mixed) == pytest.approx(bare.step_s(prompt) + bare.step_s(decode))


def test_the_baseline_uses_all_gpus_and_no_chunks() -> None:
    plan = unchunked(CODE, GOODPUT).plan
    assert plan.gpus == 8
    assert describe(plan) == "2 x tp4/whole"


def test_fewer_requests_keep_their_targets_at_a_higher_rate() -> None:
    rated = unchunked(CODE, GOODPUT)
    low, high = (fare(CODE, "colocated, unchunked", rated, rps, seed=0) for rps in (0.2, 5.0))
    assert high.share < low.share


def test_a_node_of_all_gpus_is_posed_as_one() -> None:
    assert pose(CODE, Affinity.HIGH, seed=0).node_gpus == 8
    assert pose(APPLICATIONS[0], Affinity.LOW, seed=0).node_gpus == 4


def test_reading_the_weights_twice_makes_a_colocated_plan_slower_and_nothing_else() -> None:
    bare = unchunked(CODE, GOODPUT)
    option = next(o for o in options_of(CODE.model) if o.tp == CODE.baseline_tp)
    pool = replace(bare.plan.prefill, option=option)
    plan = replace(bare.plan, prefill=pool)
    assert reads_twice(CODE, replace(bare, plan=plan, fleet=plan)) == bare
