"""Run folders and the sweep of dead runs, with real processes."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from cluster.run_dir import RUN_DIR_VARIABLE, RunDir, RunInfo, all_runs, live_runs, runs_root
from cluster.sweep import end_processes, run_processes, sweep_dead_runs
from core.errors import ConfigError

SLEEPER = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    " print(1, flush=True); time.sleep(60)",
]


def make_run(root: Path) -> RunDir:
    return RunDir.create(root, model="tiny")


def rewrite(run: RunDir, info: RunInfo) -> None:
    (run.path / "run.json").write_text(json.dumps(asdict(info)))


def kill_owner(run: RunDir) -> None:
    """Make the run belong to a real process that is dead."""
    owner = subprocess.Popen(SLEEPER, stdout=subprocess.PIPE)
    started_s = psutil.Process(owner.pid).create_time() - psutil.boot_time()
    owner.kill()
    owner.communicate()
    rewrite(run, replace(run.info(), pid=owner.pid, booted_s=started_s))


def start_in(run: RunDir, command: list[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, RUN_DIR_VARIABLE: str(run.path)}
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_run_is_one_private_folder_and_gone_after_remove(tmp_path: Path) -> None:
    root = tmp_path / "baton-me"
    run = make_run(root)
    (run.shm / "segment").write_bytes(b"x")
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (root, run.path, run.shm)}
    assert set(modes.values()) == {0o700}
    assert stat.S_IMODE((run.path / "run.json").stat().st_mode) == 0o600
    run.remove()
    assert not run.path.exists()
    assert not run.shm.exists()
    assert not root.exists()


def test_a_full_disk_is_named_and_no_half_made_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    root = tmp_path / "baton-me"
    monkeypatch.setattr("secrets.token_hex", lambda n: full(n) if n > 4 else "abcd")
    with pytest.raises(
        ConfigError, match=rf"{root} cannot be written: .*; make room, or set TMPDIR"
    ):
        make_run(root)
    assert not root.exists()


def test_the_root_stays_while_another_run_lives_in_it(tmp_path: Path) -> None:
    root = tmp_path / "baton-me"
    one, two = make_run(root), make_run(root)
    one.remove()
    assert [run.run_id for run in live_runs(root)] == [two.run_id]
    two.remove()


def test_updated_addresses_are_read_back(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.update(router_url="http://127.0.0.1:2")
    info = run.info()
    assert info.registry_address == f"unix:{run.path}/registry.sock"
    assert info.router_url == "http://127.0.0.1:2"
    assert info.pid == os.getpid()
    run.remove()


def test_the_config_of_a_run_is_read_by_its_user_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.write_config('{"router": {"api_keys": ["secret"]}}')
    assert stat.S_IMODE((run.path / "config.json").stat().st_mode) == 0o600
    run.remove()


def test_a_living_run_is_not_swept(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    process = start_in(run, SLEEPER)
    assert sweep_dead_runs(tmp_path) == []
    assert run.path.is_dir()
    assert process.poll() is None
    process.kill()
    process.communicate()
    run.remove()


def test_a_run_whose_pid_is_dead_is_swept_with_its_processes_and_memory(tmp_path: Path) -> None:
    dead, living = make_run(tmp_path), make_run(tmp_path)
    kill_owner(dead)
    (dead.shm / "segment").write_bytes(b"x")
    orphan, other = start_in(dead, SLEEPER), start_in(living, SLEEPER)
    assert sweep_dead_runs(tmp_path) == [dead.run_id]
    assert orphan.wait(5) != 0
    assert not dead.path.exists()
    assert not dead.shm.exists()
    assert other.poll() is None
    end_processes(living)
    orphan.communicate()
    other.communicate()
    living.remove()


def test_a_pid_taken_by_another_process_counts_as_dead(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    rewrite(run, replace(run.info(), booted_s=run.info().booted_s - 3600))
    assert not run.is_alive()
    assert sweep_dead_runs(tmp_path) == [run.run_id]


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere the kernel keeps the wall time of a start")
@pytest.mark.parametrize("step_s", [-3600.0, -3.0, 3.0, 3600.0])
def test_a_step_of_the_clock_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    root = tmp_path / "baton-me"
    run = make_run(root)
    # The kernel tells when it booted by the wall clock, and starts of processes since then.
    booted_s = psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted_s + step_s)
    assert sweep_dead_runs(root) == []
    assert run.is_alive()
    run.remove()


def test_a_living_run_of_another_version_is_not_swept(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path, "tiny")
    file = run.path / "run.json"
    file.write_text(json.dumps({"pid": os.getpid(), "of": "another version"}))
    assert sweep_dead_runs(tmp_path) == []
    os.utime(file, (0, 0))  # so that this process is a later one of that pid
    assert sweep_dead_runs(tmp_path) == [run.run_id]


def test_a_run_with_a_broken_run_json_is_swept(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run.path / "run.json").write_text("{")
    assert sweep_dead_runs(tmp_path) == [run.run_id]


def test_a_folder_still_being_made_is_left_alone_until_it_is_old(tmp_path: Path) -> None:
    unfinished = tmp_path / ".abcd"
    unfinished.mkdir()
    sweep_dead_runs(tmp_path)
    assert unfinished.exists()
    os.utime(unfinished, (time.time() - 7200,) * 2)
    sweep_dead_runs(tmp_path)
    assert not unfinished.exists()


def test_memory_of_a_run_whose_folder_is_gone_is_swept_and_no_other(tmp_path: Path) -> None:
    cleaned, living = make_run(tmp_path), make_run(tmp_path)
    shutil.rmtree(cleaned.path)
    sweep_dead_runs(tmp_path)
    assert not cleaned.shm.exists()
    assert living.shm.is_dir()
    living.remove()


def test_without_memory_backed_files_the_run_folder_holds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run_dir._SHARED_MEMORY", tmp_path / "nowhere")
    run = make_run(tmp_path / "baton-me")
    assert run.shm.parent == run.path
    assert run.shm.is_dir()
    run.remove()


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    process = start_in(run, STUBBORN)
    assert end_processes(run, term_s=0.2) == 1
    assert process.wait(5) == -9
    process.communicate()
    run.remove()


def test_a_process_that_only_names_the_folder_is_not_of_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    reader = subprocess.Popen([*SLEEPER, str(run.path)], stdout=subprocess.PIPE)
    assert run_processes(run) == []
    reader.kill()
    reader.communicate()
    run.remove()


def test_a_root_of_another_kind_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "baton-me").symlink_to(target)
    with pytest.raises(ConfigError, match="belongs to another user"):
        make_run(tmp_path / "baton-me")


def test_no_root_means_no_runs(tmp_path: Path) -> None:
    assert all_runs(tmp_path / "nowhere") == []
    assert sweep_dead_runs(tmp_path / "nowhere") == []


@pytest.mark.parametrize("user", ["me", "x" * 64, "", "mary.ann", "änne-mariä"])
def test_the_root_is_one_folder_per_user_that_leaves_room_for_sockets(user: str) -> None:
    root = runs_root(Path("/tmp"), user)
    assert root.parent == Path("/tmp")
    assert root.name.startswith("baton-")
    assert root.name.removeprefix("baton-").replace("_", "").isalnum()


def test_runs_are_looked_for_in_the_same_place_when_it_has_become_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TMPDIR", "/t")
    monkeypatch.setattr(
        "tempfile._get_default_tempdir", lambda *_: "/var/tmp"
    )  # as when /t is full
    monkeypatch.setattr("tempfile.tempdir", None)
    assert runs_root(user="me") == Path("/t/baton-me")


def test_two_long_user_names_do_not_share_a_root() -> None:
    assert runs_root(Path("/tmp"), "x" * 64).name == f"baton-uid{os.getuid()}"


def test_a_temporary_folder_too_long_for_sockets_gives_way_to_a_short_one() -> None:
    assert runs_root(Path("/var/folders") / ("x" * 60), "me") == Path("/tmp/baton-me")


def test_no_place_short_enough_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.run_dir._SOCKET_PATH_BYTES", 40)
    with pytest.raises(ConfigError, match="set TMPDIR to a shorter folder"):
        runs_root()
