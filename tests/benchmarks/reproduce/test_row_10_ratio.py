"""Row 10: the formula, and that the simulator follows what it says of the scarcer pool."""

import pytest

from benchmarks.reproduce.row_10_ratio import Ratio, Service, formula, goodput_rps
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve

LATENCY = FittedLatency(
    prefill=PrefillCurve(per_token_s=1e-4),
    decode=(DecodeCurve(base_s=0.01, per_sequence_s=1e-3),),
)


def service(tpot_s: float) -> Service:
    return Service(name="x", prompt_tokens=1000, output_tokens=100, tpot_s=tpot_s)


def test_the_target_bounds_the_batch_where_memory_does_not() -> None:
    found = formula(service(0.030), LATENCY, kv_tokens=10**6)
    assert found.batch == 20
    assert found.prefill_s == pytest.approx(0.1)
    assert found.answer_s == pytest.approx(3.0)
    assert found.ratio == pytest.approx(20 * 0.1 / 3.0)


def test_memory_bounds_the_batch_where_the_target_does_not() -> None:
    assert formula(service(0.030), LATENCY, kv_tokens=10_500).batch == 10


@pytest.mark.parametrize(("batch", "prefills"), [(1, 1), (30, 3), (60, 4), (10_000, 5)])
def test_each_pool_keeps_a_worker_whatever_the_ratio(batch: int, prefills: int) -> None:
    assert Ratio(prefill_s=0.1, batch=batch, answer_s=3.0).prefills(6) == prefills


def test_a_split_is_as_fast_as_its_scarcer_pool() -> None:
    found = Ratio(prefill_s=0.1, batch=30, answer_s=3.0)
    assert found.rate_rps(1, 5) == pytest.approx(10)
    assert found.rate_rps(5, 1) == pytest.approx(10)


def test_more_prefill_workers_serve_more_where_they_are_scarce() -> None:
    few = Service(name="x", prompt_tokens=3000, output_tokens=20, tpot_s=0.040)
    expected = Ratio(prefill_s=0.144, batch=141, answer_s=0.62)
    one, two = (goodput_rps(few, expected, prefills, 1, seed=0) for prefills in (1, 2))
    assert 1.3 * one < two < 3 * one
