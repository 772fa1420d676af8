"""Runs a module as a child that ends with its parent: `python -m cluster.child PID MODULE ...`.

The request to the kernel is made here, after the start, and not between fork and exec: there it
would force a real fork, and a fork of a process in which gRPC runs may abort.
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """`PID` is the parent's; `MODULE` sees the rest of the arguments as its own."""
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)  # it died before we could ask
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
