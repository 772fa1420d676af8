"""Row 6: the rules refuse what they say, where decode is the bottleneck and nowhere else."""

from dataclasses import replace

from benchmarks.reproduce.row_06_rejection import (
    AFTER,
    CASES,
    CURRENT,
    LOADS,
    NEVER,
    OURS,
    PUBLISHED,
    serve,
    serve_users,
)

TIGHT = replace(CASES[1], speed=4.0)


def test_refusals_after_the_prefill_waste_it_and_early_ones_waste_less() -> None:
    """Of one seed not always: whom a full decode worker refuses is chance."""
    never = serve(TIGHT, NEVER, None, 0, 500)
    after, early = (
        [serve(TIGHT, rule, None, s, 500) for s in range(3)] for rule in (AFTER, CURRENT)
    )
    assert never.wasted == 0.0
    assert 0.0 < sum(fare.wasted for fare in early) < sum(fare.wasted for fare in after)
    assert never.good < min(after[0].good, early[0].good)


def test_where_decode_has_room_nothing_is_refused_for_it() -> None:
    fares = [serve(PUBLISHED, rule, None, 0, 300) for rule in (NEVER, AFTER, CURRENT)]
    assert [fare.wasted for fare in fares] == [0.0] * 3


def test_the_default_refuses_for_decode_only_when_the_rule_is_on() -> None:
    never, current, predicted = (serve_users(LOADS[2], r, None, 0, 1800) for r in OURS)
    assert never.refused == 0.0
    assert min(current.refused, predicted.refused) > 0.0
    assert min(current.good, predicted.good) > never.good
