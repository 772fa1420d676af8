"""`baton goodput` on the command line, and its plot."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from cluster import goodput
from cluster.cli import app
from cluster.goodput_plot import draw_attainment
from core.estimate import Estimate
from simulator.attainment import LOADS, AttainmentCurve, Level
from simulator.goodput import Found, Point, Standing, rank

RUN = CliRunner()
TRACE = "poisson:rate=4,prompt=1000,output=20"
ARGS = ["goodput", "--trace", TRACE, "--requests", "50", "--processes", "1"]


def found(system: str, seed: int, rate: float, *, at_least: bool = False) -> Found:
    return Found(system, seed, rate, (Point(1.0, rate, 0.9),), at_least)


def answer_with(monkeypatch: pytest.MonkeyPatch, *searches: Found) -> None:
    def compare(*_: object, **__: object) -> list[Standing]:
        return rank(searches)

    def no_curves(*given: object, **_: object) -> list[AttainmentCurve]:
        return [AttainmentCurve(standing.system, ()) for standing in given[3]]  # type: ignore[attr-defined]

    monkeypatch.setattr(goodput, "compare", compare)
    monkeypatch.setattr(goodput, "attainment_curves", no_curves)


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


@pytest.mark.parametrize(
    "command", ["goodput", "plan --model llama-3-8b --gpu h100 --gpus 2 --slo 500/30"]
)
def test_a_trace_that_comes_at_once_has_no_rate_to_search(command: str, tmp_path: Path) -> None:
    """Its gaps are none at any rate: what is found is 0 at least, or nothing at all."""
    trace = tmp_path / "once.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "5,800,40\n" * 100)
    done = RUN.invoke(app, [*command.split(), "--trace", str(trace), "--requests", "100"])
    assert done.exit_code == 1
    assert "all requests come at once" in done.stderr
    assert done.stdout == ""


def test_prompts_that_are_cut_are_not_said_to_be_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer_with(monkeypatch, found("baton", 0, 0.2))
    config = tmp_path / "cluster.yaml"
    config.write_text("engine: {kind: timed, timed: {context_tokens: 600}}")
    args = [*ARGS, "--config", str(config), "--seeds", "1", "--json"]
    whole = json.loads(RUN.invoke(app, args).stdout)["notes"]
    cut = json.loads(RUN.invoke(app, [*args, "--max-prompt-tokens", "500"]).stdout)["notes"]
    assert any("longer than engine.timed.context_tokens" in note for note in whole)
    assert not any("longer than engine.timed.context_tokens" in note for note in cut)


@pytest.mark.parametrize(("rate", "is_short"), [(100.0, True), (0.05, False)])
def test_a_run_shorter_than_stays_and_targets_is_warned_of(
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


def test_a_plot_has_the_curves_of_its_json_and_the_bar_counts_their_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[int, list[int]]] = []

    @contextmanager
    def bar(_: str, total: int) -> Iterator[object]:
        bars.append((total, []))
        yield bars[-1][1].append

    monkeypatch.setattr(goodput, "bar", bar)
    plot, names = tmp_path / "goodput.png", ["baton", "colocated-least-load"]
    systems = [word for name in names for word in ("--system", name)]
    done = RUN.invoke(app, [*ARGS, *systems, "--seeds", "2", "--json", "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert plot.read_bytes().startswith(b"\x89PNG")
    for name in names:
        found = json.loads(done.stdout)["goodput"][name]
        rates = [level["requests_per_gpu_s"] for level in found["attainment"]]
        assert rates == pytest.approx([load * found["requests_per_gpu_s"] for load in LOADS])
        assert all(0 <= level["share"] <= 1 for level in found["attainment"])
    total = 2 * 2 * (1 + len(LOADS))
    assert bars == [(total, list(range(1, total + 1)))]


def test_without_a_plot_there_are_no_runs_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch, found("baton", 0, 0.2))
    monkeypatch.delattr(goodput, "attainment_curves")
    done = RUN.invoke(app, [*ARGS, "--seeds", "1", "--json"])
    assert json.loads(done.stdout)["goodput"]["baton"]["attainment"] == []


def curve(name: str) -> AttainmentCurve:
    shares = (1.0, 0.9, 0.4)
    return AttainmentCurve(
        name,
        tuple(Level(8.0 * i, 1.0 * i, Estimate(s, 0.2), (s,)) for i, s in enumerate(shares, 1)),
    )


@pytest.mark.parametrize(
    ("closed", "loads", "label"),
    [(False, [1, 2, 3], "requests/s per GPU"), (True, [8, 16, 24], "sessions open at once")],
)
def test_a_curve_is_drawn_over_its_load_below_the_share_too(
    closed: bool, loads: list[float], label: str
) -> None:
    axes = Figure().add_subplot()
    draw_attainment(axes, [curve("a")], rank([found("a", 0, 2.0)]), 0.9, closed=closed)
    drawn, share, *_ = axes.get_lines()
    assert drawn.get_xydata().tolist() == [
        [x, y] for x, y in zip(loads, (1, 0.9, 0.4), strict=True)
    ]
    assert share.get_ydata() == [0.9, 0.9]
    assert axes.get_xlabel() == label
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (min(heights), max(heights)) == (pytest.approx(0.2), 1.0)
