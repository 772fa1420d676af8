"""Online cost fits: what they learn, what they keep from the prior, and what they never do."""

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.fit import CostFit, LinearFit, PrefillCost
from tests.builders import QUICK

MB = 1e6
SIZES = (4e3, 1 * MB, 64 * MB, 512 * MB)


BASE, SLOPE = 0.001, 1e-9


def true_s(x: float) -> float:
    return BASE + SLOPE * x


def fitted(
    sizes: Sequence[float], *, count: int = 200, noise: float = 0.0, base: float = 0.1
) -> LinearFit:
    """A fit whose slope was thought 100 times too high, after `count` costs of these sizes."""
    random = Random(1)
    fit = LinearFit(base=base, slope=100 * SLOPE)
    for i in range(count):
        x = sizes[i % len(sizes)]
        fit.add(x, true_s(x) * random.uniform(1 - noise, 1 + noise))
    return fit


def test_before_any_observation_the_prior_is_the_answer() -> None:
    assert LinearFit(base=2.0, slope=3.0).predict(5.0) == pytest.approx(17.0)


@pytest.mark.parametrize("x", [*SIZES, 8 * MB])
@pytest.mark.parametrize("base", [0.01, 0.1, 1.0], ids=["slope x10", "as 1:1", "base x10"])
def test_a_line_is_found_over_five_orders_of_size(base: float, x: float) -> None:
    assert fitted(SIZES, base=base).predict(x) == pytest.approx(true_s(x), rel=0.1)


@pytest.mark.parametrize("x", SIZES)
def test_noise_of_a_third_moves_a_prediction_by_less(x: float) -> None:
    assert fitted(SIZES, noise=0.33).predict(x) == pytest.approx(true_s(x), rel=0.15)


def test_noise_at_one_size_makes_no_line_that_runs_away() -> None:
    fit = fitted([60 * MB, 64 * MB, 68 * MB], noise=0.33)
    assert fit.predict(512 * MB) == pytest.approx(true_s(512 * MB), rel=0.15)


def test_one_observation_sets_the_level_between_it_and_the_prior() -> None:
    fit = LinearFit(base=1.0, slope=1.0)
    fit.add(9.0, 30.0)
    assert 15.0 < fit.predict(9.0) < 30.0


def test_many_of_one_size_are_matched_and_leave_the_rest_to_the_prior_s_shape() -> None:
    fit = LinearFit(base=1.0, slope=0.01)
    for _ in range(200):
        fit.add(100.0, 20.0)  # ten times what the prior says
    assert fit.predict(100.0) == pytest.approx(20.0, rel=0.01)
    assert fit.predict(0.0) == pytest.approx(10.0, rel=0.05)


def test_what_is_old_is_forgotten() -> None:
    fit = fitted([1 * MB], count=100)
    for _ in range(200):
        fit.add(1 * MB, 0.02)
    assert fit.predict(1 * MB) == pytest.approx(0.02, rel=0.1)


def test_a_stall_barely_moves_a_fit_that_has_seen_enough() -> None:
    fit = fitted([1 * MB], count=100)
    before = fit.predict(1 * MB)
    fit.add(1 * MB, 1000 * before)
    assert before <= fit.predict(1 * MB) < 1.1 * before


def test_a_slowness_that_stays_is_believed_within_a_dozen() -> None:
    fit = fitted([1 * MB], count=100)
    before = fit.predict(1 * MB)
    for _ in range(12):
        fit.add(1 * MB, 100 * before)
    assert fit.predict(1 * MB) > 10 * before


def test_falling_costs_give_no_falling_line() -> None:
    fit = LinearFit(base=1.0, slope=1.0)
    for _ in range(50):
        fit.add(1.0, 10.0)
        fit.add(10.0, 1.0)
    base, slope = fit.coefficients
    assert base > 0
    assert slope >= 0


@pytest.mark.parametrize(("features", "cost"), [((0.0,), 1.0), ((1.0,), -1.0), ((-1.0,), 1.0)])
def test_an_observation_that_can_say_nothing_is_void(features: tuple[float], cost: float) -> None:
    fit = CostFit((1.0,))
    fit.add(features, cost)
    assert fit.observed == 0
    assert fit.predict((1.0,)) == 1.0


@pytest.mark.parametrize(
    ("prior", "weight", "memory"), [((), 1.0, 2.0), ((0.0,), 1.0, 2.0), ((1.0,), 0.0, 2.0)]
)
def test_a_prior_without_a_shape_or_a_weight_is_refused(
    prior: tuple[float, ...], weight: float, memory: float
) -> None:
    with pytest.raises(ValueError, match="prior"):
        CostFit(prior, weight=weight, memory=memory)


@QUICK
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(0, 1e9), min_size=3, max_size=3),
            st.floats(0, 1e6),
        ),
        max_size=60,
    ),
    st.lists(st.floats(0, 1e9), min_size=3, max_size=3),
    st.lists(st.floats(0, 1e9), min_size=3, max_size=3),
)
def test_whatever_was_seen_more_never_costs_less_than_nothing_or_than_less(
    seen: list[tuple[list[float], float]], less: list[float], more: list[float]
) -> None:
    fit = CostFit((1e-3, 1e-6, 1e-9))
    for features, cost in seen:
        fit.add(features, cost)
    total = [a + b for a, b in zip(less, more, strict=True)]
    assert 0 <= fit.predict(less) <= fit.predict(total) * (1 + 1e-9) + 1e-12


# -- prefill ------------------------------------------------------------------------------------

A, B, C = 0.004, 2e-5, 3e-9


def step_s(start: int, end: int) -> float:
    pairs = sum(i + 1 for i in range(start, end))
    return A + B * (end - start) + C * pairs


def prefill_cost(prompts: Sequence[int], chunk: int = 512, rounds: int = 4) -> PrefillCost:
    cost = PrefillCost(chunk)
    for _ in range(rounds):
        for prompt in prompts:
            for start in range(0, prompt, chunk):
                end = min(prompt, start + chunk)
                cost.add([(start, end)], step_s(start, end))
    return cost


@pytest.mark.parametrize(
    ("start", "end"), [(0, 512), (0, 8192), (7680, 8192), (0, 32_768), (16_384, 32_768)]
)
def test_prefill_is_predicted_wherever_in_a_prompt_it_is(start: int, end: int) -> None:
    cost = prefill_cost([100, 700, 8192, 32_768])
    true_s = sum(step_s(at, min(end, at + 512)) for at in range(start, end, 512))
    assert cost.predict_s(start, end) == pytest.approx(true_s, rel=0.1)


def test_chunks_of_one_size_still_tell_a_late_chunk_from_an_early_one() -> None:
    cost = prefill_cost([32_768])
    early, late = cost.predict_s(0, 512), cost.predict_s(32_256, 32_768)
    assert late / early == pytest.approx(step_s(32_256, 32_768) / step_s(0, 512), rel=0.15)


def test_what_several_sequences_share_a_step_for_counts_as_one_step() -> None:
    cost = PrefillCost(512)
    for _ in range(100):
        cost.add([(0, 100), (50, 150)], step_s(0, 100) + step_s(50, 150) - A)
        cost.add([(0, 400)], step_s(0, 400))
    assert cost.observed_steps == 200
    assert cost.predict_s(0, 200) == pytest.approx(step_s(0, 200), rel=0.1)


def test_nothing_to_compute_takes_no_time_and_teaches_nothing() -> None:
    cost = PrefillCost(512)
    cost.add([], 1.0)
    cost.add([(8, 8)], 1.0)
    assert cost.observed_steps == 0
    assert cost.predict_s(100, 100) == 0.0
