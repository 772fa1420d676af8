"""Row 8: keys that lose their workers, and what is measured around the moment they do."""

import pytest

from benchmarks.reproduce.row_08_remap import (
    SYSTEMS,
    lost_shares,
    modulo,
    one_ring,
    scale_out,
    spike_of,
    two_rings,
)
from benchmarks.routing.traces import Prompt
from benchmarks.routing.worker import Job


def test_of_modulo_a_key_stays_where_both_remainders_agree() -> None:
    some, every = lost_shares(modulo, 4, 8, seed=0, keys=4000)
    assert some == every == pytest.approx(0.5, abs=0.05)
    assert lost_shares(modulo, 4, 5, seed=0, keys=4000)[1] == pytest.approx(0.8, abs=0.05)


def test_two_rings_lose_a_home_more_often_than_one_and_all_homes_less_often() -> None:
    one = lost_shares(one_ring, 4, 8, seed=0, keys=4000)
    two = lost_shares(two_rings, 4, 8, seed=0, keys=4000)
    assert one[0] == one[1]
    assert two[1] < one[1] < two[0]


def test_without_new_workers_nothing_is_lost() -> None:
    assert lost_shares(two_rings, 4, 4, seed=0, keys=100) == (0, 0)


def test_minutes_are_counted_from_the_moment_of_change() -> None:
    def job(at_s: float, ttft_s: float, hit_tokens: int) -> Job:
        return Job(Prompt(at_s, 100, ()), at_s, [], ends_s=at_s + ttft_s, hit_tokens=hit_tokens)

    jobs = [job(0, 9, 0), job(70, 1, 50), job(100, 2, 0), job(159, 4, 20), job(200, 1, 80)]
    spike = spike_of(jobs, 100.0)
    assert spike.ttft_s == (1, 3, 1)
    assert spike.hit_share == (0.5, 0.1, 0.8)


@pytest.mark.timeout(60)
def test_new_workers_take_their_share() -> None:
    spikes = {name: scale_out(None, name, 8, seed=0, count=400) for name in SYSTEMS}
    assert all(0 <= share < 1 for spike in spikes.values() for share in spike.hit_share)
    assert spikes["baton"].ttft_s[2] < spikes["modulo"].ttft_s[2]
