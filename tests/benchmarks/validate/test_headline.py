"""The headline's comparison, on a tiny workload."""

from dataclasses import replace

import pytest

from benchmarks.validate.headline import (
    LARGE,
    OURS,
    QUICK,
    Setup,
    _case,
    _json,
    _settings,
    _table,
    _target,
    fit_window,
    judge_case,
)
from simulator.goodput import LEAST_TARGETS, SYSTEMS, Question, recorded_rate_per_s

TRACE = "poisson:rate=8,prompt=2000,output=50,spread=0.5"
SIZE = replace(QUICK, chat_requests=60, splits=(4,), step_tokens=(256, 1024))


@pytest.mark.timeout(120)
def test_all_systems_are_judged_on_the_same_seeds_best_first() -> None:
    case = _case(TRACE, "tiny", SIZE, prompt_tokens=2000)
    told: list[tuple[str, int, int]] = []
    judged = judge_case(case, SIZE, 1, lambda *step: told.append(step))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert (told[0], told[-1]) == (("tiny: tuning", 0, 20), ("tiny: judged", 20, 20))
    rows, setups = judged.standings, judged.setups
    assert {row.system for row in rows} == set(SYSTEMS)
    assert [row.goodput.mean for row in rows] == sorted(
        (row.goodput.mean for row in rows), reverse=True
    )
    assert all([one.seed for one in row.found] == [0, 1] for row in rows)
    assert rows[0].behind.mean == 0
    assert setups["baton"] == OURS
    assert setups["dynamo"] == Setup(4, OURS.step_tokens)
    assert setups["colocated-prefix"] in (Setup(0, 256), Setup(0, 1024))
    table = _table(case, judged)
    assert "simulated" in table.title
    assert "4P:4D" in {row[1] for row in table.rows}
    assert _json(rows[0], OURS)["by_seed"] == [
        round(one.rate_per_gpu_s, 4) for one in rows[0].found
    ]
    assert _target("tiny", rows).held == next(r for r in rows if r.system == "baton").is_tied


def test_a_larger_model_takes_more_gpus_per_worker_and_the_tuned_step_reaches_the_engine() -> None:
    case = _case(TRACE, "large", QUICK, prompt_tokens=9000, model=LARGE)
    settings = _settings(case, Setup(0, 1024))
    assert (settings.simulation.model, settings.simulation.tensor_parallel) == ("llama-3-70b", 4)
    assert settings.engine.step_tokens == 1024
    assert settings.prefill_workers + settings.decode_workers == 8


def test_a_window_is_lengthened_until_it_is_no_burst_or_has_as_many_requests_as_allowed() -> None:
    trace = "poisson:rate=40,prompt=12000,output=5,spread=0.3"
    case = _case(trace, "short", SIZE, prompt_tokens=3000)
    question = Question(trace=trace, requests=60, refine=0)
    fit = fit_window(case, replace(SIZE, most_requests=2000), question, 0)
    assert fit.question.requests > 120
    assert fit.question.requests / (8 * fit.found.rate_per_gpu_s) >= LEAST_TARGETS * case.slo.ttft_s
    assert recorded_rate_per_s(fit.question, 0) == pytest.approx(40, rel=0.2)
    assert fit_window(case, replace(SIZE, most_requests=90), question, 0).question.requests == 90


def test_long_prompts_get_the_longer_target_and_the_smaller_window() -> None:
    long = _case(TRACE, "long", QUICK, prompt_tokens=9000)
    chat = _case(TRACE, "chat", QUICK, prompt_tokens=900)
    assert (long.slo.ttft_s, chat.slo.ttft_s) == (5.0, 1.0)
    assert (long.requests, chat.requests) == (QUICK.long_requests, QUICK.chat_requests)
