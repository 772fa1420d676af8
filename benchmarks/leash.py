"""Runs a command as a child that ends with its parent: `python -m benchmarks.leash PID COMMAND`.

As cluster.child does for modules of ours; the kernel's promise survives the exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """`PID` is the parent's."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)  # it died before we could ask
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
