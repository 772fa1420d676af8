"""Runs a module as a child that ends with its parent: `python -m cluster.child PID MODULE ...`."""

import runpy
import sys

from core.parent import end_with_parent


def main() -> None:
    """`PID` is the parent's; `MODULE` sees the rest of the arguments as its own."""
    end_with_parent(int(sys.argv[1]))
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
