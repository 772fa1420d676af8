"""The network in which only loopback exists."""

import os
import socket

import pytest

from benchmarks.router.peers.network import loopback_only


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@pytest.mark.skipif(os.geteuid() != 0, reason="a network of one's own takes root")
def test_inside_there_is_loopback_alone_and_it_works_and_outside_all_is_as_before() -> None:
    before = interfaces()
    with loopback_only() as apart:
        if not apart:
            pytest.skip("this machine does not allow networks of one's own")
        assert interfaces() == {"lo"}
        with socket.create_server(("127.0.0.1", 0)) as door:
            socket.create_connection(door.getsockname(), timeout=1).close()
    assert interfaces() == before
