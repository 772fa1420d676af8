"""The bench `reproduce`: a part per published result, numbered as in docs/reproduction.md."""

from benchmarks.reproduce import (
    row_02_placement,
    row_04_mooncake,
    row_05_cache_size,
    row_06_rejection,
    row_07_dualmap,
    row_08_remap,
    row_09_forward,
    row_10_ratio,
    row_12_mixes,
    row_13_migration,
    row_14_headroom,
    row_18_ttl,
)
from benchmarks.types import Bench

BENCH = Bench(
    name="reproduce",
    takes_traces=True,
    parts=(
        row_02_placement.PART,
        row_04_mooncake.PART,
        row_05_cache_size.PART,
        row_06_rejection.PART,
        row_07_dualmap.PART,
        row_08_remap.PART,
        row_09_forward.PART,
        row_10_ratio.PART,
        row_12_mixes.PART,
        row_13_migration.PART,
        row_14_headroom.PART,
        row_18_ttl.PART,
    ),
)
