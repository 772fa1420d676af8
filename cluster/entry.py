"""The entry point of `baton`. What it needs is imported for most of a second: an interrupt
meanwhile ends it as one at any other time does, without a traceback.
"""

import os
import signal
import sys
from types import FrameType


def main() -> None:
    """Import the command line and run it."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    from cluster.cli import main as run  # noqa: PLC0415 - see above

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        run()
    except KeyboardInterrupt:  # before a command has begun
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _leave(number: int, frame: FrameType | None) -> None:
    """At once: an exception could be caught by whatever is being imported."""
    os.write(2, b"interrupted\n")
    os._exit(130)
