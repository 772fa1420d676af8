"""DistServe's case: its inputs. What it finds is in docs/planning.md."""

import json
from pathlib import Path
from random import Random
from statistics import fmean

import pytest

from benchmarks.types import BenchFailed
from benchmarks.validate.distserve import (
    Attainment,
    attainment,
    draw_lengths,
    read_recorded,
)


def test_drawn_lengths_have_the_means_of_the_recorded_ones() -> None:
    random = Random(0)
    drawn = [draw_lengths(random) for _ in range(20_000)]
    assert fmean(prompt for prompt, _ in drawn) == pytest.approx(780, rel=0.03)
    assert fmean(output for _, output in drawn) == pytest.approx(176, rel=0.1)
    assert max(prompt + output for prompt, output in drawn) < 2003 + 1085


def test_recorded_requests_are_read(tmp_path: Path) -> None:
    file = tmp_path / "recorded.json"
    file.write_text(json.dumps([{"prompt_len": 7, "output_len": 3, "start_time": 0.5}]))
    (request,) = read_recorded(file)
    assert (request.at_s, request.prompt_tokens, request.output_tokens) == (0.5, 7, 3)


@pytest.mark.parametrize("text", ["", "[1]", '[{"prompt_len": 7}]'])
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(BenchFailed, match=r"other\.json is no workload"):
        read_recorded(file)


def test_attainment_falls_with_the_rate_as_published() -> None:
    points: list[Attainment] = attainment(seeds=1)
    shares = [point.simulated for point in points]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.95
    assert shares[-1] < 0.8
