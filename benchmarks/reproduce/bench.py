"""The bench `reproduce`: a part per published result, numbered as in docs/reproduction.md."""

from benchmarks.reproduce import row_02_placement, row_10_ratio, row_12_mixes
from benchmarks.types import Bench

BENCH = Bench(name="reproduce", parts=(row_02_placement.PART, row_10_ratio.PART, row_12_mixes.PART))
