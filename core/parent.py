"""A process that ends with the one that started it, whatever ends that one."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Called in a child, once it runs: `parent` is the pid that started it.

    Not between fork and exec: a request made there forces a real fork, and a fork of a process in
    which gRPC runs may abort. Elsewhere than on Linux nothing watches.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)  # it died before we could ask
