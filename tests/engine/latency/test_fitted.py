"""The model of coefficients: what each term charges, and runs that equal their steps."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import TimedConfig
from engine.latency.base import StepShape, steps_within
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve

MODEL = FittedLatency(
    prefill=PrefillCurve(base_s=0.01, per_token_s=1e-4, per_pair_s=2e-7),
    decode=(
        DecodeCurve(base_s=0.02, per_sequence_s=1e-4, per_context_token_s=1e-6),
        DecodeCurve(base_s=0.01, per_sequence_s=2e-4, per_context_token_s=1e-6, from_sequences=95),
    ),
    mixed_saves_s=0.004,
)


def prefill_s(*chunks: tuple[int, int]) -> float:
    return MODEL.step_s(StepShape(chunks, 0, 0))


def test_chunks_of_a_prompt_cost_its_whole_plus_a_base_each() -> None:
    bounds = [0, 300, 512, 1000]
    assert sum(prefill_s(chunk) for chunk in pairwise(bounds)) == pytest.approx(
        prefill_s((0, 1000)) + 2 * 0.01
    )


def test_a_pair_costs_twice_the_square_of_whole_prompts() -> None:
    squared = FittedLatency(prefill=PrefillCurve(per_token2_s=1e-7), decode=(DecodeCurve(),))
    paired = FittedLatency(prefill=PrefillCurve(per_pair_s=2e-7), decode=(DecodeCurve(),))
    shape = StepShape([(0, 4096)], 0, 0)
    assert paired.step_s(shape) == pytest.approx(squared.step_s(shape))


def test_a_mixed_step_reads_the_weights_once() -> None:
    apart = MODEL.step_s(StepShape([(0, 64)], 0, 0)) + MODEL.step_s(StepShape([], 8, 800))
    assert MODEL.step_s(StepShape([(0, 64)], 8, 800)) == pytest.approx(apart - 0.004)


@pytest.mark.parametrize(("sequences", "base_s"), [(94, 0.02 + 94e-4), (95, 0.01 + 190e-4)])
def test_a_batch_takes_the_curve_of_its_size(sequences: int, base_s: float) -> None:
    assert MODEL.step_s(StepShape([], sequences, 0)) == pytest.approx(base_s)


@given(sequences=st.integers(1, 200), context=st.integers(1, 10_000), steps=st.integers(1, 300))
def test_a_run_is_the_sum_of_its_steps(sequences: int, context: int, steps: int) -> None:
    each = [MODEL.step_s(StepShape([], sequences, context + k * sequences)) for k in range(steps)]
    assert MODEL.decode_run_s(sequences, context, steps) == pytest.approx(sum(each))


@given(context=st.integers(1, 10_000), steps=st.integers(0, 500), most=st.integers(0, 400))
def test_steps_within_a_time_are_those_that_are_complete(
    context: int, steps: int, most: int
) -> None:
    just_after_s = MODEL.decode_run_s(3, context, steps) + 1e-6
    assert steps_within(MODEL, 3, context, just_after_s, most) == min(steps, most)


def test_defaults_of_the_timed_engine_charge_a_steps_tokens_together() -> None:
    model, shape = FittedLatency.of(TimedConfig()), StepShape([(0, 100), (50, 150)], 2, 300)
    milliseconds = 3.91 + 0.01424 * 200 + 7.56e-7 * 200**2 + 6.12 + 0.0091 * 2 + 4.21e-5 * 300
    assert model.step_s(shape) == pytest.approx(milliseconds / 1e3)
