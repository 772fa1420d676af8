"""`baton plan`: what it takes, prints and writes."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from cluster import plan
from cluster.cli import app
from cluster.config_file import load_config
from cluster.plan import plain_requests, read_offer, read_slo
from cluster.plan_config import config_text
from cluster.plan_view import answer_json, show_answer
from cluster.preflight import find_problems
from cluster.simulate import settings_of
from core.errors import ConfigError, InvalidRequest
from core.ids import BlockHash
from simulator.build import build_spec
from simulator.plan.trial import plan_setup
from simulator.plan.types import Affinity, Answer, Goodput, Plan, Pool, Rated
from simulator.workload.types import SimRequest, Workload
from tests.simulator.plan.problems import option, problem

DEMO = Path(__file__).parents[2] / "demo_model" / "checkpoint"
PROBLEM = problem(option(), option(2), gpus=8)


def _rated(tp: int, prefills: int, decodes: int, rps: float) -> Rated:
    pool = Pool(option=PROBLEM.options[tp - 1], step_tokens=2048, workers=prefills)
    whole = Plan(prefill=pool, decode=replace(pool, workers=decodes))
    return Rated(
        plan=whole,
        fleet=whole,
        goodput=Goodput(rps=rps, share=0.9, ttft_p90_s=0.1, tpot_p90_s=0.01, hit_share=0.0),
    )


def _answer(*best: Rated) -> Answer:
    return Answer(best=best, colocated=None, warnings=("a warning",), simulated=len(best))


@pytest.mark.parametrize(
    ("text", "ttft_s", "share"), [("500/50", 0.5, 0.9), ("200/100/99", 0.2, 0.99)]
)
def test_targets_are_read(text: str, ttft_s: float, share: float) -> None:
    slo, kept = read_slo(text)
    assert (slo.ttft_s, kept) == (ttft_s, share)


@pytest.mark.parametrize("text", ["500", "500/x", "0/50", "500/50/101", "1/2/3/4"])
def test_targets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--slo is"):
        read_slo(text)


def test_a_kind_may_be_limited() -> None:
    assert read_offer("a100:16", 32).count == 16
    assert read_offer("h100", 32).count == 32
    with pytest.raises(InvalidRequest, match="NAME:COUNT"):
        read_offer("h100:many", 32)
    with pytest.raises(ConfigError, match="no datasheet"):
        read_offer("abacus", 32)


def _workload(*firsts: bytes) -> Workload:
    requests = tuple(SimRequest(0.0, 600, 1, (BlockHash(first),)) for first in firsts)
    return Workload(name="w", block_size=512, requests=requests, horizon_s=0.0)


def test_hashes_that_nobody_shares_are_dropped_and_shared_ones_kept() -> None:
    size, requests = plain_requests(_workload(b"a", b"b"))
    assert (size, requests[0].hashes) == (16, ())
    size, requests = plain_requests(_workload(b"a", b"a"))
    assert (size, requests[0].hashes) == (512, (b"a",))


def test_the_config_written_is_one_that_config_check_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    file = tmp_path / "cluster.yaml"
    file.write_text(config_text(DEMO, PROBLEM, _answer(_rated(1, 2, 6, 8.0))))
    config = load_config(file)
    assert find_problems(config) == []
    assert (config.prefill.workers, config.decode.workers) == (2, 6)
    assert config.engine.step_tokens == config.engine.chunk_tokens == 2048
    assert build_spec(settings_of(config), 16, 0).gpus == 8


@pytest.mark.parametrize("affinity", list(Affinity))
def test_the_config_written_simulates_the_workers_that_were_planned(
    affinity: Affinity, tmp_path: Path
) -> None:
    """Their NICs too: an A100's is half as fast as what a simulation takes where nobody says."""
    a100 = problem(option(gpu="a100"), gpus=8, affinity=affinity)
    slow = replace(a100.options[0], nic_bytes_per_s=25e9, nvlink_bytes_per_s=300e9)
    pool = Pool(option=slow, step_tokens=2048, workers=2)
    rated = _rated(1, 2, 6, 8.0)
    planned = replace(rated.plan, prefill=pool, decode=replace(pool, workers=6))
    file = tmp_path / "cluster.yaml"
    file.write_text(config_text(DEMO, a100, _answer(replace(rated, plan=planned))))
    spec = build_spec(settings_of(load_config(file)), a100.block_size, 0)
    setup = plan_setup(a100, planned, 1.0)
    for found, wanted in zip(spec.pools, setup.pools, strict=True):
        assert found.worker.nic_bytes_per_s == wanted.worker.nic_bytes_per_s
        assert found.worker.kv_blocks == wanted.worker.kv_blocks
        assert found.worker.step_tokens == wanted.worker.step_tokens


def test_a_better_plan_of_two_kinds_of_gpu_is_not_said_to_need_more_of_them_per_worker() -> None:
    mixed = _rated(1, 4, 4, 9.0)
    decode = replace(mixed.plan.prefill, option=option(gpu="a100"))
    mixed = replace(mixed, plan=replace(mixed.plan, decode=decode))
    text = config_text(DEMO, PROBLEM, _answer(mixed, _rated(1, 4, 4, 8.0)))
    assert "more than one GPU per worker" not in text
    assert "GPUs of two kinds" in text


def test_a_plan_that_workers_cannot_run_is_named_and_the_next_one_written() -> None:
    text = config_text(DEMO, PROBLEM, _answer(_rated(2, 2, 2, 9.0), _rated(1, 4, 4, 8.0)))
    assert "# The best plan, prefill 2 x h100 tp2" in text
    assert "# a warning" in text
    with pytest.raises(InvalidRequest, match="runs on one GPU"):
        config_text(DEMO, PROBLEM, _answer(_rated(2, 2, 2, 9.0)))


def test_a_model_known_by_name_cannot_be_written() -> None:
    with pytest.raises(InvalidRequest, match="checkpoint folder"):
        config_text(Path("llama-3-8b"), PROBLEM, _answer(_rated(1, 4, 4, 8.0)))


def test_the_command_prints_one_json_object_last() -> None:
    command = (
        "plan --model llama-3-8b --gpu h100 --gpus 2 --slo 1000/50 --chunk 2048 --requests 100"
        " --processes 1 --node-gpus 1 --trace poisson:rate=1,prompt=1000,output=20,requests=100"
    )
    result = CliRunner().invoke(app, [*command.split(), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["simulated"] is True
    assert found["plans"][0]["pools"]["prefill"]["workers"] == 1
    assert found["plans"][0]["simulated_workers"] == [1, 1]
    assert found["colocated"]["gpus"] == 2


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    command = (
        "plan --model llama-3-70b --gpu h100 --gpus 1 --slo 1000/50"
        " --trace poisson:rate=1,prompt=1000,output=20,requests=100"
    )
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert "llama-3-70b does not fit h100 at TP 1" in result.stderr


def test_no_worker_has_more_gpus_of_a_kind_than_there_are() -> None:
    """A worker of two is none where there is one, though another kind makes up the number."""
    command = (
        "plan --model llama-3-70b --gpu h100:1 --gpus 8 --slo 1000/50"
        " --trace poisson:rate=1,prompt=1000,output=20,requests=100"
    )
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 1
    assert "nothing fits" in result.stderr
    assert "llama-3-70b does not fit h100 at TP 1" in result.stderr


@pytest.mark.parametrize(
    ("model", "path", "said"),
    [
        ("llama-3-8b", "cluster.yaml", "--write needs --model to be a checkpoint folder"),
        (str(DEMO), "none/cluster.yaml", "there is no folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_search(
    model: str, path: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "search", _not_reached)
    command = f"plan --model {model} --gpu h100 --gpus 2 --slo 500/30 --trace poisson:rate=1"
    result = CliRunner().invoke(app, [*command.split(), "--write", str(tmp_path / path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: --write")
    assert said in result.stderr


def _not_reached(*_: object, **__: object) -> Answer:
    raise AssertionError("nothing is searched")


def test_an_answer_is_printed_though_its_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()

    def search(*_: object, **__: object) -> Answer:
        folder.rmdir()
        return _answer(_rated(1, 2, 6, 8.0))

    monkeypatch.setattr(plan, "search", search)
    command = f"plan --model {DEMO} --gpu h100 --gpus 8 --slo 500/30 --trace poisson:rate=1"
    write = ["--json", "--write", str(folder / "cluster.yaml")]
    result = CliRunner().invoke(app, [*command.split(), *write])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["plans"][0]["gpus"] == 8
    assert "cannot be written" in result.stderr


def test_a_kind_of_gpu_named_twice_is_refused() -> None:
    command = "plan --model llama-3-8b --gpu h100 --gpu h100:2 --gpus 4 --slo 500/30"
    result = CliRunner().invoke(app, [*command.split(), "--trace", "poisson:rate=1"])
    assert result.exit_code == 1
    assert result.stderr == "error: --gpu names h100 twice; say it once, as h100:COUNT\n"


def test_rates_that_are_bounds_are_shown_as_such() -> None:
    bound = replace(
        _rated(1, 2, 6, 8.0),
        goodput=replace(_rated(1, 2, 6, 8.0).goodput, at_least=True),
    )
    console = Console(width=200, file=io.StringIO())
    show_answer(console, "m", PROBLEM, _answer(bound), ())
    assert ">= 8.00" in console.file.getvalue()  # type: ignore[attr-defined]
    (found,) = answer_json("m", PROBLEM, _answer(bound), ())["plans"]  # type: ignore[misc]
    assert found["at_least"] is True


# -- Ctrl-C -------------------------------------------------------------------------------------

_DEADLINE_S = 60.0


def _in_session(session: int) -> list[psutil.Process]:
    """Those of a session that have not ended."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait_until(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + _DEADLINE_S
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the command", "to its group"])
def test_an_interrupt_ends_the_search_and_leaves_no_process(
    send: Callable[[int, int], None], number: signal.Signals, tmp_path: Path
) -> None:
    """To the group is what a terminal does, while the processes of the search still start."""
    code = "from cluster.cli import main; main()"
    options = (
        "plan --model llama-3-8b --gpu h100 --gpus 32 --slo 500/30 --processes 2"
        " --trace poisson:rate=4,prompt=1000,output=200"
    )
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        command = subprocess.Popen(
            [sys.executable, "-c", code, *options.split()],
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        _wait_until(lambda: "simulating" in log.read_text())
        assert len(_in_session(command.pid)) > 2
        send(command.pid, number)
        printed, _ = command.communicate(timeout=_DEADLINE_S)
        assert (command.returncode, printed) == (130, b"")
        assert log.read_text().splitlines()[-1].startswith("interrupted: the search was given up")
        assert "Traceback" not in log.read_text() and "leaked" not in log.read_text()
        _wait_until(lambda: not _in_session(command.pid))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
        command.wait(_DEADLINE_S)
