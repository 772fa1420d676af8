"""Coefficients from steps: found again where there are some, never negative."""

from random import Random

import pytest

from engine.latency.base import StepShape
from engine.latency.fitted import DecodeCurve, FittedLatency, PrefillCurve
from simulator.profiles.fit import fit_decode, fit_latency, fit_prefill
from simulator.profiles.tables import table_of
from simulator.profiles.types import BadProfile, DecodePoint, Measured, PrefillPoint

TRUE = FittedLatency(
    prefill=PrefillCurve(base_s=4e-3, per_token_s=1.4e-5, per_pair_s=1.5e-9),
    decode=(DecodeCurve(base_s=6e-3, per_sequence_s=9e-6, per_context_token_s=4e-8),),
)
LENGTHS = (128, 512, 2048, 8192)
BATCHES = ((1, 512), (8, 512), (64, 512), (1, 4096), (8, 4096), (64, 4096))


def measure(noise: float = 0.0) -> Measured:
    random = Random(0)

    def seen(shape: StepShape) -> float:
        return TRUE.step_s(shape) * (1 + noise * random.uniform(-1, 1))

    return Measured(
        prefill=tuple(PrefillPoint(0, n, seen(StepShape([(0, n)]))) for n in LENGTHS),
        decode=tuple(DecodePoint(b, b * c, seen(StepShape([], b, b * c))) for b, c in BATCHES),
    )


def test_coefficients_are_found_again() -> None:
    fitted = fit_latency(measure())
    assert fitted.prefill.base_s == pytest.approx(4e-3)
    assert fitted.prefill.per_token_s == pytest.approx(1.4e-5)
    assert fitted.prefill.per_pair_s == pytest.approx(1.5e-9)
    assert fitted.decode[0].base_s == pytest.approx(6e-3)
    assert fitted.decode[0].per_sequence_s == pytest.approx(9e-6)
    assert fitted.decode[0].per_context_token_s == pytest.approx(4e-8)


@pytest.mark.parametrize(
    "shape",
    [StepShape([(0, 4096)]), StepShape([(4096, 4608)]), StepShape([], 32, 64_000)],
)
def test_noise_of_a_tenth_moves_what_is_predicted_by_less(shape: StepShape) -> None:
    assert fit_latency(measure(0.1)).step_s(shape) == pytest.approx(TRUE.step_s(shape), rel=0.1)


def test_a_term_that_would_be_negative_is_left_out() -> None:
    falling = [PrefillPoint(0, n, 1.0 / n) for n in (10, 100, 1000)]
    curve = fit_prefill(falling)
    assert min(curve.base_s, curve.per_token_s, curve.per_pair_s) >= 0


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(BadProfile, match="2 decode steps are too few"):
        fit_decode([DecodePoint(1, 1, 1.0), DecodePoint(2, 2, 1.0)])


def test_a_step_without_time_is_refused() -> None:
    with pytest.raises(BadProfile, match="no time"):
        fit_prefill([PrefillPoint(0, n, 0.0) for n in LENGTHS])


# -- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", LENGTHS)
def test_a_table_has_the_prompts_that_were_measured(n: int) -> None:
    shape = StepShape([(0, n)])
    assert table_of(measure()).step_s(shape) == pytest.approx(TRUE.step_s(shape))


@pytest.mark.parametrize(("sequences", "context"), BATCHES)
def test_a_table_has_the_decodes_that_were_measured(sequences: int, context: int) -> None:
    shape = StepShape([], sequences, sequences * context)
    assert table_of(measure()).step_s(shape) == pytest.approx(TRUE.step_s(shape))


@pytest.mark.parametrize(
    "shape",
    [StepShape([(8192, 10240)]), StepShape([(0, 60_000)]), StepShape([], 32, 32 * 2048)],
)
def test_a_table_goes_on_between_and_beyond_as_the_fit(shape: StepShape) -> None:
    assert table_of(measure()).step_s(shape) == pytest.approx(TRUE.step_s(shape), rel=0.05)
