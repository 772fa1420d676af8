"""One simulation, and the search for a rate."""

from dataclasses import replace

import pytest

from core.ids import BlockHash
from router.policies.base import Slo
from simulator.plan.trial import (
    decode_setup,
    find_goodput,
    highest,
    offered,
    plan_setup,
    prefill_setup,
    repeat,
    simulate,
)
from simulator.plan.types import Goodput, Plan, Pool
from simulator.workload.types import SimRequest
from tests.simulator.plan.problems import option, problem


def _goodput(rps: float, capacity_rps: float) -> Goodput:
    share = 1.0 if rps <= capacity_rps else 0.0
    return Goodput(rps=rps, share=share, ttft_p90_s=0.1, tpot_p90_s=0.01, hit_share=0.0)


@pytest.mark.parametrize("guess_rps", [0.1, 1.9, 2.0, 30.0])
def test_the_rate_found_is_within_the_width_below_the_capacity(guess_rps: float) -> None:
    found = highest(lambda rps: _goodput(rps, 2.0), share=0.9, guess_rps=guess_rps, width=0.05)
    assert 2.0 / 1.05 <= found.rps <= 2.0


def test_targets_that_no_rate_keeps_give_a_goodput_of_nothing() -> None:
    found = highest(lambda rps: _goodput(rps, 0.0), share=0.9, guess_rps=1.0, width=0.05)
    assert found.rps == 0.0


@pytest.mark.parametrize("guess_rps", [1.0, 7.0, 30.0])
def test_rates_beyond_the_most_are_not_tried_and_the_answer_is_at_least_that(
    guess_rps: float,
) -> None:
    tried: list[float] = []

    def at(rps: float) -> Goodput:
        tried.append(rps)
        return _goodput(rps, 100.0)

    found = highest(at, share=0.9, guess_rps=guess_rps, width=0.05, most_rps=7.0)
    assert (found.rps, found.at_least, max(tried)) == (7.0, True, 7.0)


def test_a_worker_that_takes_no_time_is_searched_with_so_many_requests_at_most() -> None:
    fast = replace(
        problem(option(per_token_s=1e-9)), run_s=20.0, least_requests=50, most_requests=200
    )
    found = find_goodput(fast, prefill_setup(fast, fast.options[0], 512))
    stay_s = fast.slo.ttft_s
    assert (found.rps, found.at_least) == (pytest.approx(200 / (10 * stay_s)), True)


def test_a_rate_between_one_kept_and_one_missed_is_no_bound() -> None:
    found = highest(lambda rps: _goodput(rps, 2.0), share=0.9, guess_rps=1.0, width=0.05)
    assert not found.at_least


def test_requests_are_stretched_to_the_rate() -> None:
    requests = offered(problem(option()), 4.0, 0.0)
    assert requests[-1].at_s == pytest.approx((len(requests) - 1) / 4.0)


def test_a_run_lasts_as_long_at_any_rate() -> None:
    for rps in (20.0, 400.0):
        assert offered(problem(option()), rps, 20.0)[-1].at_s == pytest.approx(20.0, rel=0.01)


def test_requests_repeated_share_blocks_with_their_own_copy_alone() -> None:
    asked = tuple(
        SimRequest(float(i), 32, 1, (BlockHash(b"shared"), BlockHash(b"%d" % i))) for i in range(3)
    )
    requests = repeat(asked, 7)
    assert requests[:3] == list(asked)
    assert [request.at_s for request in requests] == pytest.approx(list(range(7)))
    assert [request.hashes[0] == requests[3].hashes[0] for request in requests] == (
        [False] * 3 + [True] * 3 + [False]
    )
    assert len({request.hashes[1] for request in requests}) == 7


def test_what_comes_before_the_first_can_have_left_is_not_counted() -> None:
    long = replace(problem(option(), output=200), run_s=30.0)
    setup = decode_setup(long, long.options[0])
    assert (setup.run_s, setup.warm_up) == (30.0, pytest.approx(200 * 0.03 / 30.0, rel=0.01))


def test_a_prefill_worker_alone_waits_for_no_decode() -> None:
    small = problem(option(kv_tokens=8_000, decode_s=1.0))
    alone = simulate(small, prefill_setup(small, small.options[0], 1000), 0.05)
    assert alone.ttft_p90_s == pytest.approx(0.104, abs=1e-4)
    assert alone.share == 1.0


def test_a_decode_worker_alone_waits_for_no_prefill() -> None:
    slow = problem(option(per_token_s=1.0), output=51)
    alone = simulate(slow, decode_setup(slow, slow.options[0]), 0.05)
    assert alone.ttft_p90_s < 0.001
    assert alone.tpot_p90_s == pytest.approx(0.01 + 2e-7 * 1026, rel=1e-2)


def test_a_tensor_parallel_worker_keeps_a_target_that_one_gpu_cannot() -> None:
    tight = problem(option(1), option(2), slo=Slo(ttft_s=0.08, tpot_s=0.03))
    one, two = (
        simulate(tight, prefill_setup(tight, each, 1000), 0.1).share for each in tight.options
    )
    assert one == 0.0
    assert two > 0.9


def test_a_whole_plan_counts_both_targets() -> None:
    whole = problem(option(), slo=Slo(ttft_s=10.0, tpot_s=0.005))
    pool = Pool(option=whole.options[0], step_tokens=512, workers=1)
    setup = plan_setup(whole, Plan(prefill=pool, decode=pool), 1.0)
    found = simulate(whole, setup, 0.1)
    assert found.ttft_p90_s < 10.0
    assert found.share == 0.0


def test_a_run_may_end_once_its_share_is_missed_and_one_that_keeps_it_is_run_whole() -> None:
    asked = problem(option(), slo=Slo(ttft_s=1.0, tpot_s=0.05))
    setup = prefill_setup(asked, asked.options[0], 1000)
    kept, missed = 0.5 * setup.guess_rps, 4 * setup.guess_rps
    assert simulate(asked, setup, kept, only_if_kept=True) == simulate(asked, setup, kept)
    at_most, whole = (
        simulate(asked, setup, missed, only_if_kept=True),
        simulate(asked, setup, missed),
    )
    assert whole.share < at_most.share < asked.share
