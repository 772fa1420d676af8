"""The bench `router`: its parts, in the order of the report."""

from benchmarks.router import idle, load
from benchmarks.types import Bench

BENCH = Bench(name="router", parts=(load.PART, idle.PART))
