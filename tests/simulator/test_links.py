"""Links by hand times: what shares one waits, and none carries more than it can."""

from random import Random

import pytest

from simulator.links import Link, Network, send


def test_transfers_share_a_link_and_leave_others_alone() -> None:
    shared, own, other = Link(100.0), Link(1000.0), Link(1000.0)
    assert send((shared, own), 0.0, 100) == 1.0
    assert send((shared, other), 0.5, 100) == 2.0
    assert send((other,), 0.5, 100) == pytest.approx(0.6)  # the one before comes there at 1 s


def test_only_other_domains_are_reached_by_the_uplink() -> None:
    network = Network(uplink_bytes_per_s=10.0)
    a, b, c = network.port(0, 100.0), network.port(0, 100.0), network.port(1, 100.0)
    assert send(network.path(a, b), 0.0, 100) == 1.0
    assert send(network.path(a, c), 1.0, 100) == 11.0


def test_what_waits_for_its_senders_nic_passes_the_receivers_only_then() -> None:
    network = Network(uplink_bytes_per_s=1e6)
    a, b, c, other = (network.port(0, 1.0) for _ in range(4))
    assert send(network.path(a, other), 0.0, 10) == 10.0
    assert send(network.path(a, b), 0.0, 1) == 11.0
    assert send(network.path(c, b), 10.0, 1) == 12.0  # b receives the other one from 10 to 11 s


def test_a_receivers_nic_is_free_for_others_while_a_transfer_waits_for_its_sender() -> None:
    network = Network(uplink_bytes_per_s=1e6)
    a, b, c, d, other = (network.port(0, 1.0) for _ in range(5))
    send(network.path(a, other), 0.0, 10)
    send(network.path(a, b), 0.0, 1)
    assert send(network.path(c, b), 1.0, 2) == 3.0
    # What does not fit before the one that waits goes on after it.
    assert send(network.path(d, b), 1.0, 8) == 12.0


def test_what_waits_for_a_busy_receiver_leaves_its_sender_free() -> None:
    network = Network(uplink_bytes_per_s=1e6)
    a, b, c, other = (network.port(0, 1.0) for _ in range(4))
    assert send(network.path(a, b), 0.0, 10) == 10.0
    assert send(network.path(c, b), 0.0, 1) == 11.0
    assert send(network.path(c, other), 1.0, 1) == 2.0


def test_a_link_is_never_idle_while_something_waits_and_carries_one_thing_at_a_time() -> None:
    random, link, now_s = Random(0), Link(1.0), 0.0
    busy = [False] * 5_000
    for _ in range(400):
        now_s += random.randrange(8)
        come = int(now_s) + random.choice([0, 0, 0, random.randrange(40)])
        nbytes = random.randrange(1, 6)
        free = [at for at in range(come, len(busy)) if not busy[at]][:nbytes]
        assert link.carry(now_s, come, nbytes) == (free[0], free[-1] + 1)
        for at in free:
            busy[at] = True
