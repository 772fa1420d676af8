from dataclasses import replace
from random import Random

import pytest

from core.step import work_alone
from router.curves import Curves, PrefillCurve, WorkerKind, kind_of, peak_tokens, residual_quantiles
from tests.router.views import HELLO

KIND = kind_of(HELLO)


def test_a_prompt_takes_steps_tokens_and_pairs() -> None:
    curve = PrefillCurve(10.0, 1.0, 0.5)
    assert curve.seconds(2, 7, step_tokens=4) == 2 * 10 + 5 + 0.5 * (3 + 4 + 5 + 6 + 7)
    assert curve.seconds(7, 7, step_tokens=4) == 0


def test_the_prefill_curve_is_learned_from_prompts() -> None:
    curves, true, random = Curves(), PrefillCurve(0.02, 3e-4, 1e-8), Random(0)
    for second in range(100):
        tokens = random.randrange(100, 9000)
        cached = random.randrange(tokens)
        work = work_alone(cached, tokens)
        curves.saw_prefill(KIND, work, true.of(work), float(second))
    learned = curves.of(KIND).prefill
    for start, end in ((0, 500), (0, 6000), (4000, 6000)):
        assert learned.seconds(start, end) == pytest.approx(true.seconds(start, end), rel=0.1)


def test_steps_of_any_size_are_learned_from() -> None:
    curves, true, random = Curves(), PrefillCurve(0.02, 3e-5, 1e-9), Random(0)
    for second in range(100):
        tokens, most = random.randrange(100, 9000), random.choice((256, 2048))
        work = work_alone(0, tokens, most)
        assert true.of(work) == pytest.approx(true.seconds(0, tokens, most))
        curves.saw_prefill(KIND, work, true.of(work), float(second))
    learned = curves.of(KIND).prefill
    for most in (256, 1024, 2048):
        assert learned.seconds(0, 6000, most) == pytest.approx(true.seconds(0, 6000, most), rel=0.1)
        assert learned.queue_token_s(most) == pytest.approx(true.queue_token_s(most), rel=0.1)


def test_the_decode_curve_is_learned_from_steps() -> None:
    curves, random = Curves(), Random(0)
    for second in range(100):
        sequences, context = random.randrange(1, 64), random.randrange(100, 50_000)
        step_s = 0.02 + 5e-5 * sequences + 1e-7 * context
        curves.saw_decode(KIND, sequences, context, step_s, float(second))
    learned = curves.of(KIND).decode
    assert learned.seconds(8, 8000) == pytest.approx(0.0212, rel=0.1)
    assert learned.seconds(60, 40_000) == pytest.approx(0.027, rel=0.1)


def test_a_flood_of_observations_is_rationed_once_there_is_something_to_predict_from() -> None:
    curves = Curves()
    for i in range(3):
        assert not curves.measured(KIND)
        curves.saw_prefill(KIND, work_alone(0, 1000), 1.0, i * 0.001)
    assert curves.measured(KIND)
    before = curves.of(KIND).prefill
    curves.saw_prefill(KIND, work_alone(0, 1000), 9.0, 0.1)
    assert curves.of(KIND).prefill == before
    curves.saw_prefill(KIND, work_alone(0, 1000), 9.0, 0.3)
    assert curves.of(KIND).prefill != before


# -- peak memory --------------------------------------------------------------------------------


def test_of_answers_of_one_length_what_is_left_is_even_between_it_and_nothing() -> None:
    assert residual_quantiles((100,) * 5, count=4) == (75, 50, 25, 0)


def test_long_answers_are_met_more_often_than_they_begin() -> None:
    quantiles = residual_quantiles((10, 990), count=10)
    assert quantiles[4] > 400


def test_the_peak_counts_those_that_last_longest_with_what_they_have_yet_to_grow() -> None:
    # 2 of 10 tokens: after 0 more both, after 60 more one alone.
    assert peak_tokens(20, 2, (60, 0)) == max((20 + 2 * 60) / 2, 20)


def test_without_any_history_the_peak_is_what_is_there() -> None:
    assert peak_tokens(20, 2, ()) == 20


def test_output_lengths_are_known_after_a_few() -> None:
    curves = Curves()
    for _ in range(7):
        curves.saw_output(100)
    assert curves.residuals == ()
    assert curves.steps_to_go == 0
    curves.saw_output(100)
    assert len(curves.residuals) == 16
    assert curves.steps_to_go == pytest.approx(50, abs=1)


def test_kinds_that_restarts_leave_behind_are_forgotten_and_those_in_use_are_not() -> None:
    curves = Curves()
    for second in range(2000):
        curves.of(WorkerKind("", f"restart {second}", 100))
        curves.saw_prefill(KIND, work_alone(0, 1000), 0.5, float(second))
    assert len(curves._kinds) == 256
    assert curves.measured(KIND)
    assert curves.of(KIND).prefill.seconds(0, 1000) == pytest.approx(0.5, rel=0.1)


def test_gpus_with_as_much_memory_need_not_be_as_fast() -> None:
    curves = Curves()
    for second in range(4):
        for device, seconds in (("A100", 0.9), ("H100", 0.3)):
            kind = kind_of(replace(HELLO, device=device))
            curves.saw_prefill(kind, work_alone(0, 1000), seconds, float(second))
    slow, fast = (curves.of(kind_of(replace(HELLO, device=d))).prefill for d in ("A100", "H100"))
    assert slow.seconds(0, 1000) == pytest.approx(0.9, rel=0.1)
    assert fast.seconds(0, 1000) == pytest.approx(0.3, rel=0.1)


def test_arenas_sized_by_what_memory_was_free_are_equally_fast_and_other_gpus_are_not() -> None:
    curves = Curves()
    for size in (30_000, 60_000):
        for second in range(4):
            kind = kind_of(replace(HELLO, num_blocks=size))
            curves.saw_prefill(kind, work_alone(0, 1000), size / 1e5, float(second))

    def seconds(num_blocks: int) -> float:
        return curves.of(kind_of(replace(HELLO, num_blocks=num_blocks))).prefill.seconds(0, 1000)

    assert {seconds(size) for size in (29_500, 30_041, 27_300, 33_000)} == {seconds(30_000)}
    assert seconds(60_001) == seconds(60_000)
    assert seconds(30_000) == pytest.approx(0.3, rel=0.1)
    assert seconds(60_000) == pytest.approx(0.6, rel=0.1)
    assert seconds(45_000) == Curves().of(kind_of(HELLO)).prefill.seconds(0, 1000)
    curves.saw_prefill(kind_of(replace(HELLO, num_blocks=30_041)), work_alone(0, 1000), 0.5, 9.0)
    assert seconds(30_000) > 0.31, "they learn together"
    assert len({kind_of(replace(HELLO, num_blocks=size)) for size in range(28_000, 32_000)}) < 50
