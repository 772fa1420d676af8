"""`baton profile`: what it makes of answers' times, and whom it cannot measure."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.profile import decode_row, prefill_row
from cluster.profile_client import Answer, parse_url
from core.errors import ConfigError


def answer(first_s: float, step_s: float, tokens: int) -> Answer:
    return Answer(10.0, tuple(first_s + step_s * i for i in range(tokens)))


def test_a_prompts_row_is_the_median_time_to_its_first_token() -> None:
    answers = [answer(10.0 + ttft_s, 0.1, 1) for ttft_s in (0.5, 0.3, 9.0)]
    row = prefill_row(700, answers)
    assert (row.start, row.end) == (0, 700)
    assert row.seconds == pytest.approx(0.5)


def test_a_batchs_row_has_the_gaps_while_all_decode_and_their_context() -> None:
    early = Answer(0.0, (1.0, 1.5, 2.0, 2.1, 2.2, 2.3, 2.4))
    late = Answer(0.0, (2.0, 2.1, 2.2, 2.3, 2.4, 2.9, 3.4))
    row = decode_row(2, 100, [early, late])
    assert row.seconds == pytest.approx(0.1)
    assert row.context_tokens == 2 * 100 + round(2 * (4.5 + 2.5) / 2)


def test_answers_that_hardly_overlap_are_no_batch() -> None:
    with pytest.raises(ConfigError, match="hardly decoded together"):
        decode_row(2, 100, [answer(1.0, 0.1, 8), answer(5.0, 0.1, 8)])


@pytest.mark.parametrize(
    ("url", "place"),
    [("http://127.0.0.1:8000", ("127.0.0.1", 8000)), ("localhost:81/v1", ("localhost", 81))],
)
def test_a_router_is_named_by_its_url(url: str, place: tuple[str, int]) -> None:
    assert parse_url(url) == place


@pytest.mark.parametrize("url", ["", "https://x", "http://x:port"])
def test_what_is_no_url_of_a_router_is_a_sentence(url: str) -> None:
    with pytest.raises(ConfigError):
        parse_url(url)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    out = tmp_path / "none" / "p.json"
    nobody = "http://127.0.0.1:9"  # measuring would fail there, with another sentence
    done = CliRunner().invoke(app, ["profile", "--url", nobody, "--out", str(out)])
    assert done.exit_code == 1
    assert done.stderr == f"error: --out: there is no folder {out.parent}\n"
