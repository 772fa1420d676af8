"""A network namespace in which only loopback exists.

Dynamo's planes listen on the machine's own address, for anybody. In here that is loopback, and so
all routers are measured in here, alike.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


@contextmanager
def loopback_only() -> Iterator[bool]:
    """This thread, and processes it starts, live in such a namespace inside the block.

    Gives False, and changes nothing, where that is not allowed: it takes Linux and root.
    """
    if sys.platform != "linux":
        yield False
        return
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        entered = libc.unshare(_CLONE_NEWNET) == 0
        if entered:
            _raise_loopback()
        try:
            yield entered
        finally:
            if entered and libc.setns(before, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "cannot return to the network of before")
    finally:
        os.close(before)


def _raise_loopback() -> None:
    """As `ip link set lo up`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, asked))
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))
