"""The bench `routing`: its parts, in the order of the report."""

from benchmarks.routing import decision, quality
from benchmarks.types import Bench

BENCH = Bench(name="routing", parts=(decision.PART, quality.PART), takes_traces=True)
