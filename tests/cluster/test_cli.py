"""The command line: what it prints where, and with which status."""

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.config import ClusterConfig
from cluster.run_dir import RunDir, live_runs, runs_root

CONTROLLER = """
import signal, sys, time
from pathlib import Path
from cluster.run_dir import RunDir
run = RunDir.create(Path(sys.argv[1]), "tiny")
def stop(*_):
    if sys.argv[2] == "orderly":
        run.remove()
        sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print(run.run_id, flush=True)
while True:
    time.sleep(0.05)
"""


def baton(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def config_file(folder: Path, text: str = "model: {path: /models/tiny}\n") -> str:
    (folder / "cluster.yaml").write_text(text)
    return str(folder / "cluster.yaml")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder of its own, so that clusters of the user are out of sight."""
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield runs_root()


@pytest.fixture
def controllers(root: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that own a run, started by `start_controller`."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()
    for run in live_runs(root):
        run.remove()


def start_controller(
    root: Path, started: list[subprocess.Popen[str]], manner: str = "orderly"
) -> str:
    process = subprocess.Popen(
        [sys.executable, "-c", CONTROLLER, str(root), manner], stdout=subprocess.PIPE, text=True
    )
    started.append(process)
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_show_prints_every_setting_with_its_default() -> None:
    shown = yaml.safe_load(baton("config", "show").stdout)
    assert shown["decode"]["workers"] == 2
    assert shown["model"]["path"] is None
    assert shown.keys() == ClusterConfig.model_fields.keys()


def test_show_in_json_is_the_same_and_can_be_loaded_again(tmp_path: Path) -> None:
    file = config_file(tmp_path, "model: {path: m}\nslo: {ttft_ms: 7}")
    result = baton("config", "show", "--config", file, "--json")
    config = ClusterConfig.model_validate_json(result.stdout)
    assert config.slo.ttft_ms == 7
    assert config.model.path == tmp_path / "m"


def test_show_masks_the_password_of_redis(tmp_path: Path) -> None:
    registry = "registry: {kind: redis, url: 'redis://:secret@host:6379/0'}"
    result = baton("config", "show", "-c", config_file(tmp_path, f"model: {{path: m}}\n{registry}"))
    assert "secret" not in result.output
    assert "redis://***@host:6379/0" in result.stdout


def test_show_masks_api_keys(tmp_path: Path) -> None:
    file = config_file(tmp_path, "model: {path: m}\nrouter: {api_keys: [secret]}")
    result = baton("config", "show", "-c", file)
    assert "secret" not in result.output
    assert "***" in result.stdout


def test_schema_describes_the_keys() -> None:
    schema = json.loads(baton("config", "schema").stdout)
    assert "model" in schema["required"]
    assert schema["properties"]["drain_timeout_s"]["description"]


def test_a_typo_is_one_sentence_on_standard_error_and_status_1(tmp_path: Path) -> None:
    file = config_file(tmp_path, "model: {path: m}\ndecode: {worker: 1}")
    for command in (["up"], ["config", "show"], ["config", "check"], ["demo"]):
        result = baton(*command, "--config", file)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr == (
            f"error: {file}: decode.worker is not a known key; did you mean decode.workers?\n"
        )


def test_check_tells_every_problem_at_once(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        file = config_file(tmp_path, f"model: {{path: /nowhere}}\nrouter: {{port: {port}}}")
        result = baton("config", "check", "-c", file, "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 1
    assert not answer["ok"]
    assert len(answer["problems"]) == 2


def test_up_refuses_a_missing_checkpoint_before_anything_starts(root: Path) -> None:
    result = baton("up", "--model", "/nowhere/model")
    assert result.exit_code == 1
    assert "/nowhere/model" in result.stderr
    assert "Traceback" not in result.output
    assert not root.exists()


def test_status_without_a_cluster_says_how_to_start_one(root: Path) -> None:
    result = baton("status")
    assert result.exit_code == 1
    assert result.stderr == "error: no cluster is running; start one with `baton up`\n"


def test_down_without_a_cluster_is_fine_but_an_unknown_run_is_not(root: Path) -> None:
    assert baton("down").exit_code == 0
    assert baton("down", "--all").exit_code == 0
    assert baton("down", "--run", "abcd").exit_code == 1


def test_a_cluster_that_still_starts_is_told_apart(root: Path) -> None:
    run = RunDir.create(root, "tiny")
    result = baton("status")
    assert result.exit_code == 1
    assert f"cluster {run.run_id} is starting" in result.stderr
    run.remove()


def test_with_two_clusters_one_must_be_named(
    root: Path, controllers: list[subprocess.Popen[str]]
) -> None:
    one, two = start_controller(root, controllers), start_controller(root, controllers)
    for command in ("status", "down"):
        result = baton(command)
        assert result.exit_code == 1
        assert "2 clusters are running, choose one with --run" in result.stderr
        assert one in result.stderr
        assert two in result.stderr
    assert baton("down", "--run", one).stdout == f"cluster {one} stopped\n"
    assert [run.run_id for run in live_runs(root)] == [two]
    assert baton("down", "--all").stdout == f"cluster {two} stopped\n"
    assert live_runs(root) == []


def test_down_kills_a_cluster_that_does_not_stop(
    root: Path, controllers: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.runs._FORCE_S", 0.2)
    run_id = start_controller(root, controllers, "stubborn")
    result = baton("down", "--timeout-s", "0.2")
    assert result.stdout == f"cluster {run_id} had to be killed\n"
    assert controllers[0].wait(5) == -signal.SIGKILL
    assert not (root / run_id).exists()


def test_down_removes_what_a_killed_cluster_has_left(
    root: Path, controllers: list[subprocess.Popen[str]]
) -> None:
    killed = start_controller(root, controllers)
    living = start_controller(root, controllers)
    controllers[0].kill()
    controllers[0].wait()
    result = baton("down", "--run", living)
    assert result.stdout.splitlines() == [
        f"removed what run {killed} had left behind",
        f"cluster {living} stopped",
    ]
    assert not root.exists()


def test_help_names_every_command() -> None:
    text = baton("--help").stdout
    assert all(command in text for command in ("up", "down", "status", "demo", "config"))


def test_an_interrupt_before_the_work_has_begun_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cluster.simulate.load_workload", interrupted)
    done = baton("simulate", "--trace", "poisson:rate=1")
    assert (done.exit_code, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_the_version_is_told() -> None:
    result = baton("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"baton \d+\.\d+\.\d+\n", result.stdout)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_one_sentence() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from cluster.cli import main; main()", "config", "schema"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr
