"""The bench `transfer`: its parts, in the order of the report."""

from benchmarks.transfer import control, layouts, migration, overlap, path
from benchmarks.types import Bench

BENCH = Bench(
    name="transfer",
    parts=(path.PART, layouts.PART, control.PART, overlap.PART, migration.PART),
)
