"""The command `baton` as users run it: real engines, real router, real everything."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from cluster.demo import DEMO_MODEL
from cluster.run_dir import all_runs, runs_root
from cluster.sweep import end_processes, run_processes

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

BATON = str(Path(sys.executable).with_name("baton"))


@dataclass(slots=True)
class Shell:
    """Runs `baton` with a temporary folder of its own."""

    temporary: Path

    @property
    def root(self) -> Path:
        return runs_root(self.temporary)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.temporary)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BATON, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        try:
            out, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, errors = process.communicate()
        return subprocess.CompletedProcess(arguments, process.returncode, out, errors)

    def clean_up(self) -> None:
        for run in all_runs(self.root):
            end_processes(run, term_s=0.1)
            run.remove()
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def shell() -> Iterator[Shell]:
    shell = Shell(Path(tempfile.mkdtemp(prefix="b", dir="/tmp")))
    yield shell
    shell.clean_up()


def ready_event(up: subprocess.Popen[str]) -> dict[str, str]:
    assert up.stdout is not None
    for line in up.stdout:
        event: dict[str, str] = json.loads(line)
        if event["event"] == "ClusterReady":
            return event
    assert up.stderr is not None
    raise AssertionError(up.stderr.read())


def test_the_demo_holds_every_promise_and_leaves_nothing(shell: Shell) -> None:
    done = shell.run("demo", timeout_s=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 5 checks held" in done.stdout
    assert done.stdout.count("identical") == 6  # five requests and the check
    assert "Traceback" not in done.stderr
    assert list(shell.temporary.iterdir()) == []


def test_a_cluster_serves_tells_its_status_keeps_its_port_and_goes_down(shell: Shell) -> None:
    config = shell.temporary / "cluster.yaml"
    config.write_text(
        f"model: {{path: {DEMO_MODEL}, served_name: tiny}}\n"
        "router: {port: 0}\n"
        "prefill: {workers: 1}\n"
        "decode: {workers: 1}\n"
        "engine: {kind: timed}\n"
        "telemetry: {spans_file: spans.jsonl, worker_metrics_port: 0, log_level: warning}\n"
    )
    up = shell.start("up", "--config", str(config), "--json")
    try:
        ready = ready_event(up)
        (run,) = all_runs(shell.root)

        with openai.OpenAI(
            base_url=f"{ready['url']}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.Client(trust_env=False, timeout=60),
        ) as client:
            answer = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "What is a list? " * 10}],
                max_tokens=5,
            )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5

        status = json.loads(shell.run("status", "--json").stdout)
        assert status["ready"]
        assert [worker["worker_id"] for worker in status["workers"]] == ["decode-0", "prefill-0"]
        decode, prefill = (worker["stats"] for worker in status["workers"])
        assert decode["transfer_bytes"] > 0
        assert prefill["leases_closed"] == prefill["leases_opened"] == 1
        assert decode["blocks"]["held"] == prefill["blocks"]["held"] == 0
        with httpx.Client(trust_env=False) as scraper:
            address = prefill["metrics_address"]
            metrics = scraper.get(f"http://{address}/metrics").text
        assert 'baton_kv_leases_ended_total{outcome="closed"} 1.0' in metrics
        assert "serving" in shell.run("status", "--leases").stdout

        port = ready["url"].rpartition(":")[2]
        second = shell.run("up", "--config", str(config), "--port", port)
        assert second.returncode == 1
        (line,) = second.stderr.splitlines()
        assert port in line
        assert "in use" in line

        down = shell.run("down")
        assert down.stdout == f"cluster {ready['run_id']} stopped\n"
        assert up.wait(10) == 0
        assert run_processes(run) == []
        left = {path.name for path in shell.temporary.iterdir()}
        assert left == {"cluster.yaml", "spans.jsonl"}
        spans = [
            json.loads(line) for line in config.with_name("spans.jsonl").read_text().splitlines()
        ]
        assert {"request", "prefill", "kv_transfer", "decode"} <= {span["name"] for span in spans}
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGTERM)
        up.communicate(timeout=60)
