"""A child that ends with its parent, and sees only its own arguments."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

CHILD = """
import sys, time
print(sys.argv[1:], __name__, flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "cluster.child", str(os.getpid()), "sleepy", "--x"])
print(child.pid, flush=True)
child.wait()
"""


def environment(folder: Path) -> dict[str, str]:
    (folder / "sleepy.py").write_text(CHILD)
    return {**os.environ, "PYTHONPATH": str(folder)}


def gone_within(pid: int, timeout_s: float) -> bool:
    """Wait for a process that is not a child of ours."""
    give_up_at_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at_s:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_child_sees_its_arguments_and_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "['--x'] __main__\n"
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert gone_within(pid, 10)


def test_a_child_whose_parent_is_gone_already_does_not_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.child", "1", "sleepy"],
        env=environment(tmp_path),
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == b""
