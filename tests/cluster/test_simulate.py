"""`baton simulate` on the command line."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typer.testing import CliRunner

from cluster import simulate
from cluster.cli import app
from cluster.config_file import load_config
from cluster.simulate import settings_of
from simulator.build import build_spec
from simulator.cluster import Cluster, Outcome
from simulator.profiles.own import DecodeRow, OwnProfile, PrefillRow, own_text

RUN = CliRunner()
TRACE = "poisson:rate=4,prompt=1000,output=20"


def write(folder: Path, text: str) -> str:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return str(file)


def test_simulate_ends_with_one_json_object_and_draws(tmp_path: Path) -> None:
    config = write(tmp_path, "prefill: {workers: 1}\ndecode: {workers: 2}\n")
    plot = tmp_path / "run.png"
    done = RUN.invoke(
        app,
        ["simulate", "--config", config, "--trace", TRACE, "--requests", "60", "--plot", str(plot)],
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["simulated"] is True
    assert (result["requests"], result["gpus"]) == (60, 3)
    assert result["outcomes"] == {"ok": 60}
    assert 0 < result["ttft_s"]["p50"] < 1
    assert "simulated" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_prints_the_same_bytes() -> None:
    args = ["simulate", "--trace", TRACE, "--requests", "40", "--seed", "3", "--json"]
    first, second = RUN.invoke(app, args), RUN.invoke(app, args)
    assert first.stdout == second.stdout
    assert len(first.stdout.splitlines()) == 1
    other = RUN.invoke(app, [*args[:-2], "4", "--json"])
    assert other.stdout != first.stdout


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("simulation: {pools: [{name: a, role: prefill, workers: 1}]}", "prefill and decode pools"),
        ("simulation: {failures: [{at_s: 1, pool: decode, worker: 9}]}", "no worker 9"),
        ("simulation: {kv_tokens: 100}", "no block of 512 tokens"),
        ("simulation: {profile: nowhere.npz}", "nowhere"),
        ("simulation: {profile: 'distserve:opt-13b', model: llama-3-8b}", "is of opt-13b"),
        ("simulation: {kv_token: 100}", "did you mean"),
    ],
)
def test_what_is_wrong_with_a_config_is_said_in_a_sentence(
    tmp_path: Path, text: str, said: str
) -> None:
    config = write(tmp_path, text)
    done = RUN.invoke(app, ["simulate", "--config", config, "--trace", TRACE, "--requests", "9"])
    assert done.exit_code == 1
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_the_model_whose_steps_are_simulated_is_named(tmp_path: Path) -> None:
    config = write(tmp_path, "simulation: {profile: 'distserve:opt-13b'}")
    args = ["simulate", "--config", config, "--trace", TRACE, "--requests", "9"]
    done = RUN.invoke(app, [*args, "--plot", str(tmp_path / "run.png")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["workers"] == (
        "steps of distserve:opt-13b, opt-13b"
    )
    assert "steps of distserve:opt-13b, opt-13b" in done.stdout.splitlines()[-2]


def test_kv_is_that_of_the_profiles_model(tmp_path: Path) -> None:
    config = write(tmp_path, "simulation: {profile: 'distserve:opt-13b'}")
    pools = build_spec(settings_of(load_config(Path(config), {"model.path": Path()})), 16, 0).pools
    assert {pool.worker.kv_bytes_per_token for pool in pools} == {2 * 40 * 5120 * 2}
    assert {pool.worker.kv_blocks for pool in pools} == {66_144 // 16}


def test_a_config_may_come_through_a_pipe() -> None:
    """As `--config <(helm template ...)` gives it: what has been read of it is gone."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        stream.write("decode: {workers: 3}\n")
    args = ["simulate", "--trace", TRACE, "--requests", "10", "--json"]
    done = RUN.invoke(app, [*args, "--config", f"/dev/fd/{reading}"])
    os.close(reading)
    assert json.loads(done.stdout)["gpus"] == 5


def test_an_interrupt_ends_a_run_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Outcome:
        raise KeyboardInterrupt

    monkeypatch.setattr(Cluster, "run", interrupted)
    done = RUN.invoke(app, ["simulate", "--trace", TRACE, "--requests", "9", "--json"])
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "interrupted: the run was given up, nothing is known\n"


def test_a_file_that_is_no_trace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello\n")
    done = RUN.invoke(app, ["simulate", "--trace", str(file)])
    assert done.exit_code == 1
    assert "notes.txt" in done.stderr


def test_a_plot_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    args = ["simulate", "--trace", TRACE, "--requests", "9", "--json", "--plot"]
    done = RUN.invoke(app, [*args, str(tmp_path / "run.nothing")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["requests"] == 9
    assert "no plot" in done.stderr


def test_what_was_skipped_of_a_trace_is_in_the_json_too(tmp_path: Path) -> None:
    file = tmp_path / "some.csv"
    file.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,9,9\n1,9,0\n")
    done = RUN.invoke(app, ["simulate", "--trace", str(file), "--json"])
    result = json.loads(done.stdout)
    assert result["notes"] == ["1 x no prompt or no answer"]
    assert (result["requests"], result["rate_per_s"]) == (1, 0.0)


def test_what_is_assumed_of_the_kv_is_in_the_table_and_the_json(tmp_path: Path) -> None:
    own = OwnProfile(
        model="unheard-of",
        device="d",
        prefill=tuple(PrefillRow(start=0, end=n, seconds=n / 1e4) for n in (100, 200, 400)),
        decode=tuple(
            DecodeRow(sequences=b, context_tokens=b * c, seconds=0.01 + b * c / 1e6)
            for b in (1, 8)
            for c in (100, 1000)
        ),
    )
    (tmp_path / "own.json").write_text(own_text(own))
    config = write(tmp_path, f"simulation: {{profile: {tmp_path / 'own.json'}}}")
    args = ["simulate", "--config", config, "--trace", TRACE, "--requests", "9"]
    done = RUN.invoke(app, [*args, "--plot", str(tmp_path / "run.png")])
    notes = json.loads(done.stdout.splitlines()[-1])["notes"]
    assert [word for note in notes for word in note.split() if word.startswith("simulation.")] == [
        "simulation.kv_tokens",
        "simulation.kv_bytes_per_token,",
        "simulation.model",
    ]
    assert all(note in done.stdout.splitlines() for note in notes)


def test_latencies_say_how_many_were_served_and_curves_end_below_one_by_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(_: Path, title: str, panels: Mapping[str, Callable[[Axes], None]]) -> str:
        assert title.endswith(f"latencies of {served} served, {60 - served} refused")
        for name in ("ttft_cdf", "tpot_cdf"):
            axes = Figure().add_subplot()
            panels[name](axes)
            ends.append(float(axes.get_lines()[0].get_ydata()[-1]))
            assert axes.get_ylabel() == "share of all 60 requests"
        return ""

    ends: list[float] = []
    config = write(tmp_path, "prefill: {workers: 1}\ndecode: {workers: 1}\nslo: {ttft_ms: 500}\n")
    args = ["simulate", "--config", config, "--trace", "poisson:rate=40,prompt=8000,output=20"]
    args += ["--requests", "60"]
    served = json.loads(RUN.invoke(app, [*args, "--json"]).stdout)["outcomes"]["ok"]
    monkeypatch.setattr(simulate, "draw_plot", draw)
    done = RUN.invoke(app, args)
    assert done.exit_code == 0, done.output
    assert 0 < served < 60
    said = f"of {served} served, {60 - served} refused"
    assert f"latencies {said}" in done.stdout.splitlines()
    assert json.loads(done.stdout.splitlines()[-1])["latencies"] == said
    assert ends == [pytest.approx(served / 60)] * 2
