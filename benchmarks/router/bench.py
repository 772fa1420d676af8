"""The bench `router`: its parts, in the order of the report."""

from benchmarks.router import added, closed, idle, lookup, tokens
from benchmarks.router.peers import report
from benchmarks.routing import decision
from benchmarks.types import Bench

BENCH = Bench(
    name="router",
    takes_traces=True,
    parts=(
        tokens.PART,
        closed.PART,
        added.PART,
        idle.PART,
        decision.PART,
        lookup.PART,
        report.SHORT_PART,
        report.LONG_PART,
    ),
)
