"""`baton bench`: names, parts, the files it writes, and what is left when it is interrupted."""

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner, Result

from benchmarks.run import _progress, find_bench
from cluster.cli import app
from cluster.plot import draw_plot

ROOT = Path(__file__).parents[2]
KEYS = {
    "ratio_to_raw_shm",
    "ratio_to_raw_tcp",
    "descriptors_block_first",
    "descriptors_layer_first",
    "control_ms_p50",
    "overlap_share",
    "migration_pause_ms",
    "machine",
}


def baton_bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments])


def test_without_a_name_the_benches_are_listed() -> None:
    names = [line.split("  ")[0] for line in baton_bench().stdout.splitlines()]
    assert {"routing", "transfer"} <= set(names)


def test_an_unknown_bench_is_one_sentence_that_names_those_there_are() -> None:
    result = baton_bench("transfr")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: there is no bench 'transfr'; there is: ")
    assert "transfer" in result.stderr


def test_an_unknown_part_is_one_sentence_that_names_those_there_are() -> None:
    result = baton_bench("transfer", "--part", "control", "--part", "speed")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: bench transfer has no part 'speed'; it has: path, ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["routing"], "bench routing, part quality replays traces: give one with --trace FILE"),
        (["routing", "--trace", "no.jsonl"], "--trace: there is no file no.jsonl that can be read"),
        (["transfer", "--trace", __file__], "bench transfer replays no --trace"),
        (["router", "--profiles", "."], "bench router reads no --profiles"),
        (["validate", "--profiles", "no"], "--profiles: there is no folder no"),
        (["transfer", "--plot", f"{__file__}/p.png"], f"--plot: {__file__}/p.png cannot be"),
        (["transfer", "--out", f"{__file__}/d"], f"--out: nothing can be written in {__file__}/d"),
        (["transfer", "--out", "d" * 300], "--out: nothing can be written in ddd"),
    ],
)
def test_files_that_will_not_do_are_refused_before_anything_is_measured(
    arguments: list[str], said: str
) -> None:
    result = baton_bench(*arguments)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {said}")


def test_every_part_of_the_transfer_bench_says_which_keys_it_adds() -> None:
    keys = [key for part in find_bench("transfer").parts for key in part.keys]
    assert len(keys) == len(set(keys))
    assert {*keys, "machine"} >= KEYS


@pytest.mark.processes
def test_a_part_run_for_real_ends_with_one_json_object(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = baton_bench("transfer", "--part", "control", "--quick", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() >= KEYS
    assert 0 < found["control_ms_p50"] < found["control_ms_p90"]
    assert found["overlap_share"] is None
    assert found["machine"]["cores"] >= 1
    assert "read begun on the transfer thread" in result.stdout
    assert json.loads((tmp_path / "transfer.json").read_text()) == found
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_no_process(number: signal.Signals) -> None:
    # a shell starts what runs in its background with SIGINT ignored
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heed}; from cluster.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", "transfer"]
    bench = subprocess.Popen(
        [*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    give_up_s = time.monotonic() + 30
    while not (children := psutil.Process(bench.pid).children(recursive=True)):
        assert bench.poll() is None and time.monotonic() < give_up_s
        time.sleep(0.01)
    bench.send_signal(number)
    out, _ = bench.communicate(timeout=20)
    assert bench.returncode == 130
    assert out == ""
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.processes
def test_a_zygote_given_up_before_it_is_ready_ends_without_a_word() -> None:
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        command = [sys.executable, "-m", "benchmarks.zygote", str(its.fileno())]
        started = subprocess.Popen(command, pass_fds=[its.fileno()], stderr=subprocess.PIPE)
    ours.close()
    _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (0, b"")


def test_without_matplotlib_the_plot_is_left_out_with_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    said = draw_plot(tmp_path / "p.png", "t", {"part": lambda axes: None})
    assert said == "no plot: matplotlib is not installed (pip install 'baton[bench]')"
    assert list(tmp_path.iterdir()) == []


def test_where_the_bar_cannot_be_drawn_long_work_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.run._LINE_EVERY_S", 0.0)
    with _progress("1/2 headline", "goodput") as report:
        report("azure: judged", 3, 30)
    assert capsys.readouterr().err.splitlines() == [
        "1/2 headline: goodput",
        "1/2 headline: azure: judged, 3 of 30",
    ]
