"""Plans from what single workers serve."""

from dataclasses import replace

from simulator.plan.combine import Phase, colocate, lean, neighbours, pair_up
from simulator.plan.types import Affinity, Offer, Plan
from tests.simulator.plan.problems import option, problem


def _shape(plan: Plan) -> tuple[int, int, int]:
    decodes = plan.decode.workers if plan.decode is not None else 0
    return plan.copies, plan.prefill.workers, decodes


def test_the_ratio_follows_what_each_phase_serves() -> None:
    one = option()
    (pair,) = pair_up(problem(one, gpus=8), [Phase(one, 512, 3.0)], [Phase(one, 512, 1.0)])
    assert _shape(pair.plan) == (1, 2, 6)
    assert pair.rps == 6.0


def test_pairs_are_ordered_by_requests_per_gpu() -> None:
    one, two = option(1), option(2)
    prefills = [Phase(one, 512, 2.0), Phase(two, 512, 3.0)]
    pairs = pair_up(problem(one, two, gpus=8), prefills, [Phase(one, 512, 2.0)])
    assert [pair.plan.prefill.option.tp for pair in pairs] == [1, 2]
    assert pairs[0].rps_per_gpu == 1.0


def test_a_worker_that_serves_nothing_is_in_no_plan() -> None:
    one = option()
    assert pair_up(problem(one), [Phase(one, 512, 0.0)], [Phase(one, 512, 1.0)]) == []


def test_with_low_affinity_each_node_is_a_copy_of_its_own() -> None:
    one = option()
    low = problem(one, gpus=16, affinity=Affinity.LOW, node_gpus=4)
    (pair,) = pair_up(low, [Phase(one, 512, 1.0)], [Phase(one, 512, 1.0)])
    assert _shape(pair.plan) == (4, 2, 2)
    assert pair.plan.gpus == 16
    assert pair.rps_per_gpu == 0.5


def test_with_low_affinity_a_pair_larger_than_a_node_is_no_plan() -> None:
    four = option(4)
    low = problem(four, gpus=16, affinity=Affinity.LOW, node_gpus=4)
    assert pair_up(low, [Phase(four, 512, 1.0)], [Phase(four, 512, 1.0)]) == []
    high = replace(low, affinity=Affinity.HIGH)
    assert len(pair_up(high, [Phase(four, 512, 1.0)], [Phase(four, 512, 1.0)])) == 1


def test_no_more_of_a_kind_is_used_than_there_is() -> None:
    new, old = option(gpu="h100"), option(gpu="a100")
    offers = (Offer(gpu="h100", count=2), Offer(gpu="a100", count=6))
    mixed = replace(problem(new, old, gpus=8), offers=offers)
    (pair,) = pair_up(mixed, [Phase(new, 512, 3.0)], [Phase(old, 512, 1.0)])
    assert _shape(pair.plan) == (1, 2, 6)
    (pair,) = pair_up(mixed, [Phase(old, 512, 3.0)], [Phase(new, 512, 1.0)])
    assert pair.plan.decode is not None
    assert pair.plan.decode.workers <= 2


def test_neighbours_shift_one_prefill_worker_and_fill_the_rest_with_decodes() -> None:
    one, two = option(1), option(2)
    plan = Plan(prefill=Phase(one, 512, 1.0).pool(4), decode=Phase(two, 512, 1.0).pool(2))
    near = neighbours(problem(one, two, gpus=8), plan)
    assert [_shape(other) for other in near] == [(1, 3, 2), (1, 5, 1)]


def test_colocated_workers_fill_the_gpus() -> None:
    two = option(2)
    (both,) = colocate(problem(two, gpus=8), [Phase(two, 512, 1.5)])
    assert _shape(both.plan) == (1, 4, 0)
    assert both.rps == 6.0


def test_a_lean_plan_has_a_quarter_of_the_gpus_for_prefill_and_the_worker_that_serves_most() -> (
    None
):
    one, two = option(1), option(2)
    asked = problem(one, two, gpus=8)
    phases = [Phase(one, 2048, 1.0), Phase(one, 512, 1.5), Phase(two, 512, 9.0)]
    larger, smaller = lean(asked, phases)
    assert [_shape(each.plan) for each in (larger, smaller)] == [(1, 1, 3), (1, 2, 6)]
    assert smaller.rps == 12.0
    assert {pool.step_tokens for pool in smaller.plan.pools} == {512}
    assert lean(asked, [Phase(one, 512, 0.0)]) == []


def test_a_lean_plan_fits_into_each_node_with_low_affinity_and_there_is_none_without_room() -> None:
    one, four = option(1), option(4)
    phases = [Phase(one, 512, 1.0), Phase(four, 512, 2.0)]
    low = problem(one, four, gpus=16, affinity=Affinity.LOW, node_gpus=4)
    (plan,) = lean(low, phases)
    assert _shape(plan.plan) == (4, 1, 3)
    assert plan.plan.gpus == 16
    assert lean(problem(one, gpus=1), phases[:1]) == []
