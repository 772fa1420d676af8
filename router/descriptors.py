"""Open files of the router's process: as many as its connections need, and what is said if not."""

import errno
import logging
import os
import resource
from contextlib import suppress

log = logging.getLogger(__name__)

_OWN = 1024
"""Kept for what is neither a client nor a worker that was foreseen: workers that came later,
connections that are turned away, listeners, logs.
"""


def clients_within(limit: int, wanted: int, workers: int) -> int:
    """Connections of clients where `limit` files may be open."""
    return min(wanted, max(limit - _OWN - workers, limit // 2))


def room_for_clients(wanted: int, workers: int) -> int:
    """So many connections beside a stream for each worker, or as many as the system allows; raises
    this process's own limit of open files as far as it may and needs to.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted + _OWN + workers
    if hard != resource.RLIM_INFINITY:
        most = min(hard, most)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(ValueError, OSError):  # the kernel may have a bound of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = wanted if soft == resource.RLIM_INFINITY else clients_within(soft, wanted, workers)
    if room < wanted:
        log.warning(
            "router_connections_limited connections=%d wanted=%d: raise the process's limit of open"
            " files (ulimit -Hn, LimitNOFILE) to %d, or lower router.max_connections",
            *(room, wanted, wanted + _OWN + workers),
        )
    return room


def are_exhausted() -> bool:
    """No file can be opened now, nor a connection taken."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False
