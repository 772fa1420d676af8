"""The bench `simulator`: how fast it simulates."""

from benchmarks.simulator import speed
from benchmarks.types import Bench

BENCH = Bench(name="simulator", parts=(speed.PART,))
