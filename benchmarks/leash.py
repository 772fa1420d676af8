"""Runs a command as a child that ends with its parent: `python -m benchmarks.leash PID COMMAND`.

As cluster.child does for modules of ours; the kernel's promise survives the exec.
"""

import os
import sys

from core.parent import end_with_parent


def main() -> None:
    """`PID` is the parent's."""
    end_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
