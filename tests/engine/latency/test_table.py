"""A step from tables: what each table is asked, and runs that equal their steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.latency.base import StepShape
from engine.latency.curve import Curve, Grid
from engine.latency.table import TableLatency

TABLE = TableLatency(
    dense=Curve.of({1: 1.0, 100: 2.0, 200: 4.0}),
    per_sequence=Curve.of({1: 0.1, 11: 0.2}),
    prefill=Grid.of({(0, 0): 0.0, (100, 0): 10.0, (100, 1000): 20.0, (200, 0): 40.0}),
    decode=Grid.of({(1, 10): 0.01, (1, 30): 0.02, (9, 10): 0.05, (9, 30): 0.09, (9, 90): 0.3}),
)


def test_a_chunk_pays_for_its_tokens_and_its_history() -> None:
    assert TABLE.step_s(StepShape([(500, 600)])) == pytest.approx(2.0 + 0.1 + 15.0)


def test_a_decode_pays_for_its_batch_and_mean_context() -> None:
    assert TABLE.step_s(StepShape([], 9, 180)) == pytest.approx(1 + 8 / 99 + 0.18 + 0.07)


def test_a_mixed_step_pays_the_dense_part_of_all_its_tokens_once() -> None:
    mixed = TABLE.step_s(StepShape([(0, 91)], 9, 180))
    assert mixed == pytest.approx(2.0 + 0.19 + 9.1 + 0.07)


def test_an_empty_step_takes_no_time() -> None:
    assert TABLE.step_s(StepShape([])) == 0.0


@given(sequences=st.integers(1, 20), context=st.integers(1, 2000), steps=st.integers(0, 200))
def test_a_run_is_the_sum_of_its_steps(sequences: int, context: int, steps: int) -> None:
    each = [TABLE.step_s(StepShape([], sequences, context + k * sequences)) for k in range(steps)]
    assert TABLE.decode_run_s(sequences, context, steps) == pytest.approx(sum(each))
