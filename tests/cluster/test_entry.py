"""An interrupt while `baton` still imports what it needs."""

import subprocess
import sys

import pytest

INTERRUPTED = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.{handler})
sys.meta_path.insert(0, Interrupting())
from cluster.entry import main
main()
"""


@pytest.mark.parametrize(
    ("handler", "status", "said"),
    [("default_int_handler", 130, "interrupted\n"), ("SIG_IGN", 0, "")],
    ids=["in front", "in the background of a script"],
)
def test_an_interrupt_during_the_imports_is_one_word_unless_it_is_ignored(
    handler: str, status: int, said: str
) -> None:
    command = [sys.executable, "-c", INTERRUPTED.format(handler=handler), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (ran.returncode, ran.stderr) == (status, said)
    assert ("Usage" in ran.stdout) is (status == 0)
