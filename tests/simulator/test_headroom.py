"""What a hand-off leaves free decides who waits and who is evicted."""

from dataclasses import replace

import pytest

from simulator.job import Record
from simulator.worker import Headroom
from tests.simulator.clusters import WORKER, ask, run, split


def serve(headroom: Headroom, count: int = 40) -> list[Record]:
    """Answers of 200 tokens, of which a worker holds about ten prompts and four whole ones."""
    tight = replace(WORKER, kv_blocks=120, headroom=headroom)
    spec = split(prefill=1, decode=1, worker=WORKER)
    spec = replace(
        spec,
        max_tokens=800,
        router=spec.router.model_copy(update={"local_prefill": False}),
        pools=(spec.pools[0], replace(spec.pools[1], worker=tight)),
    )
    return list(run(spec, [ask(at_s=0.2 * i, output=200) for i in range(count)]).records)


@pytest.mark.parametrize("headroom", ["running", "limit", "peak"])
def test_everybody_is_served(headroom: Headroom) -> None:
    assert {r.outcome for r in serve(headroom)} == {"ok"}


def test_nobody_is_evicted_where_all_that_clients_allow_is_left_free() -> None:
    assert sum(r.evictions for r in serve("limit")) == 0


def test_a_predicted_peak_evicts_fewer_and_starts_sooner_than_the_limit() -> None:
    running, peak, limit = serve("running", 120), serve("peak", 120), serve("limit", 120)
    assert sum(r.evictions for r in peak) < sum(r.evictions for r in running) / 2
    assert sum(r.transfer_s for r in peak) < sum(r.transfer_s for r in limit)
