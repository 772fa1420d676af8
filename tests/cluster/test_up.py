"""`baton up` around real Ray and real processes, with small hosts in place of the engines."""

import asyncio
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import psutil
import pytest

from cluster.config_file import BadConfig, load_config
from cluster.controller import StopRequest, run_cluster
from cluster.run_dir import RunDir, all_runs, runs_root
from cluster.sweep import end_processes, run_processes, sweep_dead_runs

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

HERE = Path(__file__).parent
STOP_S = 60.0
Line = dict[str, object]


@dataclass(slots=True)
class Up:
    """A running small_up.py."""

    process: subprocess.Popen[str]
    root: Path

    def until(self, event: str, **fields: object) -> Line:
        """Read events up to one of this kind with these fields."""
        assert self.process.stdout is not None
        for text in self.process.stdout:
            line: Line = json.loads(text)
            if line["event"] == event and fields.items() <= line.items():
                return line
        raise AssertionError(f"no {event} {fields} before the end: {self.errors()}")

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    @property
    def run(self) -> RunDir:
        (run,) = all_runs(self.root)
        return run

    def ended_clean(self, run: RunDir) -> int:
        """Wait for the end; nothing of the run may be left. Gives the exit status."""
        status = self.process.wait(STOP_S)
        assert run_processes(run) == []
        assert not run.path.exists()
        assert not run.shm.exists()
        assert not self.root.exists()
        return status


@contextmanager
def small_up(host: str, *arguments: str, terminal: int | None = None) -> Iterator[Up]:
    # Short, because the sockets of Ray lie inside.
    temporary = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "small_up.py"), host, *arguments],
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(path)},
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    root = runs_root(temporary)
    try:
        yield Up(process, root)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        for run in all_runs(root):
            end_processes(run, term_s=0.1)
            run.remove()
        shutil.rmtree(temporary, ignore_errors=True)


def get(url: str) -> str:
    with build_opener(ProxyHandler({})).open(f"{url}/ready", timeout=20) as response:
        return str(response.read().decode())


def test_dead_processes_are_told_replaced_and_all_is_gone_after_ctrl_c() -> None:
    with small_up("idle") as up:
        old = up.until("WorkerReady", worker_id="decode-0")
        ready = up.until("ClusterReady")
        run = up.run
        assert str(old["pid"]) in run.log_path("decode-0").read_text()

        os.kill(int(str(old["pid"])), signal.SIGKILL)
        died = up.until("WorkerDied", worker_id="decode-0", pid=old["pid"])
        assert died["reason"] == (
            "it ended without a word: killed from outside, perhaps for want of memory"
        )
        assert died["log"] == str(run.log_path("decode-0"))
        new = up.until("WorkerReady", worker_id="decode-0")
        assert new["pid"] != old["pid"]

        os.kill(int(str(new["pid"])), signal.SIGSEGV)
        died = up.until("WorkerDied", worker_id="decode-0", pid=new["pid"])
        assert died["reason"] in {"it crashed: SIGSEGV", "it crashed: Segmentation fault"}
        up.until("WorkerReady", worker_id="decode-0")

        router_pid = int(get(str(ready["url"])))
        os.kill(router_pid, signal.SIGKILL)
        assert up.until("RouterDied", pid=router_pid)["reason"] == "it was killed by SIGKILL"
        # The port stays open meanwhile: this request waits for the next router.
        assert int(get(str(ready["url"]))) != router_pid

        os.killpg(up.process.pid, signal.SIGINT)
        up.until("Stopping", reason="SIGINT")
        assert up.ended_clean(run) == 0


def test_a_log_that_has_grown_begins_anew() -> None:
    with small_up("idle", "telemetry.log_max_mb=1") as up:
        up.until("ClusterReady")
        run, log = up.run, up.run.log_path("decode-0")
        with log.open("a") as grown:
            grown.write("x" * (1 << 20))
        until_s = time.monotonic() + 20
        while log.stat().st_size and time.monotonic() < until_s:
            time.sleep(0.05)
        assert log.stat().st_size == 0
        assert log.with_name("decode-0.log.1").stat().st_size > 1 << 20
        up.process.send_signal(signal.SIGTERM)
        assert up.ended_clean(run) == 0


def test_a_worker_that_was_stopped_or_whose_loop_is_stuck_is_killed_and_replaced() -> None:
    with small_up("stuck", "hang_timeout_s=2") as up:
        old = up.until("WorkerReady", worker_id="prefill-0")
        up.until("ClusterReady")
        run = up.run
        process = psutil.Process(int(str(old["pid"])))
        process.suspend()
        died = up.until("WorkerDied", worker_id="prefill-0", pid=old["pid"])
        assert str(died["reason"]).startswith("it hung: nothing came within 2 s (hang_timeout_s)")
        assert not process.is_running()
        assert up.until("WorkerReady", worker_id="prefill-0")["pid"] != old["pid"]

        (run.path / "stick").touch()
        died = up.until("WorkerDied", worker_id="decode-0")
        assert str(died["reason"]).startswith("it hung")
        assert up.until("WorkerReady", worker_id="decode-0")["pid"] != died["pid"]
        log = run.log_path("controller").read_text()
        assert [log.count(f"worker_hangs worker_id={w}") for w in ("prefill-0", "decode-0")] == [
            1,
            1,
        ]
        up.process.send_signal(signal.SIGTERM)
        assert up.ended_clean(run) == 0


def test_a_host_that_fails_after_it_served_is_told_with_its_error_and_replaced() -> None:
    with small_up("fails_once") as up:
        up.until("ClusterReady")
        run = up.run
        (run.path / "fail").touch()
        died = up.until("WorkerDied", worker_id="decode-0")
        assert died["reason"] == "ValueError: the engine is condemned"
        assert up.until("WorkerReady", worker_id="decode-0")["pid"] != died["pid"]
        assert "Traceback" in run.log_path("decode-0").read_text()
        up.process.send_signal(signal.SIGTERM)
        up.until("Stopping", reason="SIGTERM")
        assert up.ended_clean(run) == 0


def test_a_worker_that_cannot_start_ends_the_start_with_its_reason() -> None:
    with small_up("misconfigured") as up:
        run = run_of(up)
        assert up.ended_clean(run) != 0
        (line,) = up.errors().splitlines()
        assert line.endswith("finds no weights in DIR")
        assert "could not start" in line


def test_a_start_that_takes_too_long_says_which_worker_it_waited_for() -> None:
    with small_up("loads_for_ever", "start_timeout_s=20") as up:
        run = run_of(up)
        assert up.ended_clean(run) == 1
        first, *log = up.errors().splitlines()
        assert first.startswith("decode-0 not ready within 20 s: raise start_timeout_s")
        assert any("role=decode" in line for line in log)


def test_a_start_whose_router_finds_no_workers_blames_no_model() -> None:
    with small_up("idle", "start_timeout_s=20") as up:
        run = run_of(up)
        (run.path / "alone").touch()
        assert up.ended_clean(run) == 1
        first, *log = up.errors().splitlines()
        assert first.startswith("all workers serve, but in 20 s")
        assert any("role=decode" in line for line in log)


def test_what_a_killed_controller_leaves_behind_is_swept() -> None:
    with small_up("idle") as up:
        ready = up.until("ClusterReady")
        run = up.run
        router_pid = int(get(str(ready["url"])))
        children = run_processes(run)
        assert psutil.Process(router_pid) in children
        up.process.kill()
        up.process.wait()
        assert sweep_dead_runs(up.root) == [run.run_id]
        assert not psutil.wait_procs(children, timeout=10)[1]
        assert up.ended_clean(run) == -signal.SIGKILL


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_the_end_of_a_process_of_rays_own_stops_the_cluster_in_order(name: str) -> None:
    with small_up("idle") as up:
        up.until("ClusterReady")
        run = up.run
        (process,) = [each for each in run_processes(run) if each.name() == name]
        process.kill()
        up.until("Stopping", reason="a failure")
        assert up.ended_clean(run) == 1
        assert f"Ray's own process {name} has ended" in up.errors()


def test_a_second_ctrl_c_stops_at_once_even_while_ray_starts() -> None:
    with small_up("idle") as up:
        up.until("Starting", step="Ray")
        run = up.run
        up.process.send_signal(signal.SIGINT)
        up.until("Stopping")
        up.process.send_signal(signal.SIGINT)
        assert up.ended_clean(run) == 130


def test_a_stop_by_sigterm_may_take_its_time() -> None:
    # Ray would abort a process three seconds after a SIGTERM.
    with small_up("slow_to_stop") as up:
        up.until("ClusterReady")
        run = up.run
        up.process.send_signal(signal.SIGTERM)
        assert up.ended_clean(run) == 0


def test_workers_have_the_drain_time_for_requests_of_other_routers(tmp_path: Path) -> None:
    drained = tmp_path / "drained"
    with small_up("drains", "drain_timeout_s=10", f"model.path={drained}") as up:
        up.until("ClusterReady")
        run = up.run
        up.process.send_signal(signal.SIGTERM)
        assert up.ended_clean(run) == 0
        assert drained.exists()


def test_a_closed_terminal_stops_the_cluster_in_order() -> None:
    controller, terminal = pty.openpty()
    with small_up("idle", terminal=terminal) as up:
        up.until("ClusterReady")
        run = up.run
        # What the kernel sends to a terminal's foreground group when the terminal goes away.
        os.killpg(up.process.pid, signal.SIGHUP)
        os.close(controller)
        up.until("Stopping", reason="SIGHUP")
        assert up.ended_clean(run) == 0
    os.close(terminal)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_log_that_cannot_be_written_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunDir, "log_path", lambda *_: Path("/dev/full"))
    monkeypatch.setattr("cluster.controller.runs_root", lambda: tmp_path / "baton-me")
    config = load_config(None, {"model.path": tmp_path / "nothing", "router.port": 0})
    with pytest.raises(BadConfig, match="there is no checkpoint directory"):
        asyncio.run(run_cluster(config, StopRequest(), lambda _event: None))


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup leaves to its command
    try:
        with small_up("idle") as up:
            ready = up.until("ClusterReady")
            run = up.run
            os.killpg(up.process.pid, signal.SIGHUP)
            assert get(str(ready["url"]))
            up.process.send_signal(signal.SIGTERM)
            up.until("Stopping", reason="SIGTERM")
            assert up.ended_clean(run) == 0
    finally:
        signal.signal(signal.SIGHUP, ignored)


def run_of(up: Up) -> RunDir:
    up.until("Starting", step="Ray")
    return up.run
