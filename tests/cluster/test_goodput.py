"""`baton goodput` on the command line, and its plot."""

import json

import pytest
from typer.testing import CliRunner

from cluster import goodput
from cluster.cli import app
from cluster.goodput import mean_curve
from simulator.goodput import Found, Point, Standing, rank

RUN = CliRunner()
TRACE = "poisson:rate=4,prompt=1000,output=20"
ARGS = ["goodput", "--trace", TRACE, "--requests", "50", "--processes", "1"]


def found(system: str, seed: int, rate: float, *, at_least: bool = False) -> Found:
    return Found(system, seed, rate, (Point(1.0, rate, 0.9),), at_least)


def answer_with(monkeypatch: pytest.MonkeyPatch, *searches: Found) -> None:
    def compare(*_: object, **__: object) -> list[Standing]:
        return rank(searches)

    monkeypatch.setattr(goodput, "compare", compare)


def test_goodput_compares_systems() -> None:
    done = RUN.invoke(
        app, [*ARGS, "--seeds", "2", "--system", "baton", "--system", "dynamo", "--json"]
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert set(result["goodput"]) == {"baton", "dynamo"}
    assert (result["gpus"], set(result["slo"])) == (4, {"ttft_s", "tpot_s"})
    assert result["workers"] == "steps of engine.timed's model"
    assert all(len(each["per_seed"]) == 2 for each in result["goodput"].values())


def test_one_seed_has_no_interval_and_ties_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, found("baton", 0, 0.2), found("dynamo", 0, 0.1))
    done = RUN.invoke(app, [*ARGS, "--seeds", "1", "--plot", "/dev/null/none"])
    assert done.exit_code == 0, done.output
    table, last = done.stdout.split("GPUs;")[0], json.loads(done.stdout.splitlines()[-1])
    assert "inf" not in table
    assert "baton =" not in table
    assert "dynamo =" not in table
    assert {each["tied"] for each in last["goodput"].values()} == {None}


def test_a_search_that_found_no_rate_too_high_is_at_least_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer_with(monkeypatch, *(found("baton", seed, 0.2, at_least=True) for seed in range(2)))
    done = RUN.invoke(app, [*ARGS, "--seeds", "2", "--plot", "/dev/null/none"])
    result = json.loads(done.stdout.splitlines()[-1])
    assert ">= 0.2" in done.stdout
    assert result["goodput"]["baton"]["at_least"] is True
    assert any("too high for baton: at least" in note for note in result["notes"])


@pytest.mark.parametrize(("rate", "is_short"), [(100.0, True), (0.5, False)])
def test_a_run_shorter_than_three_stays_is_warned_of(
    rate: float, *, is_short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_with(monkeypatch, *(found("baton", seed, rate) for seed in range(2)))
    result = json.loads(RUN.invoke(app, [*ARGS, "--seeds", "2", "--json"]).stdout)
    assert any("a burst and not a rate" in note for note in result["notes"]) == is_short


def test_an_interrupt_ends_the_search_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> list[Standing]:
        raise KeyboardInterrupt

    monkeypatch.setattr(goodput, "compare", interrupted)
    done = RUN.invoke(app, [*ARGS, "--json"])
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "interrupted: the search was given up, no rate is known\n"


def test_the_curve_is_the_mean_of_the_seeds_over_rates_that_all_of_them_kept() -> None:
    one = [Point(1, 1.0, 1.0), Point(2, 2.0, 0.98), Point(4, 4.0, 0.94), Point(8, 8.0, 0.899)]
    other = [Point(1, 1.5, 1.0), Point(3, 3.0, 0.90), Point(5, 5.0, 0.899)]
    rates, shares = mean_curve([Found("a", 0, 4.0, (*one,)), Found("a", 1, 3.0, (*other,))], 0.9)
    assert (rates[0], rates[-1]) == (1.5, 3.0)
    assert rates == sorted(set(rates))
    assert shares[0] == pytest.approx((0.99 + 1.0) / 2)
    assert shares[-1] == pytest.approx((0.96 + 0.90) / 2)


def test_seeds_without_rates_in_common_have_no_curve() -> None:
    assert mean_curve([found("a", 0, 4.0), found("a", 1, 3.0)], 0.9) == ([], [])
