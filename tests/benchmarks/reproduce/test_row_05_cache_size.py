"""Row 5: more is never remembered by less."""

import pytest

from benchmarks.reproduce.row_05_cache_size import hits_of


@pytest.mark.timeout(60)
def test_hits_grow_with_the_cache_and_shrink_with_its_parts() -> None:
    hits = hits_of(None, seed=0, count=400, placed=(10_000_000,))
    pooled = list(hits.pooled.values())
    assert pooled == sorted(pooled)
    assert 0 < pooled[0] < pooled[-1]
    assert all(hits.scattered[size] <= hits.pooled[size] for size in hits.pooled)
    assert hits.scattered[10_000_000] < hits.placed[10_000_000] <= hits.pooled[None]
