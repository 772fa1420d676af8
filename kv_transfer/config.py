"""Settings of the KV hand-off."""

from typing import Literal

from pydantic import Field

from core.config import Settings


class TransferConfig(Settings):
    """Leases and the transport that moves blocks."""

    backend: Literal["auto", "nixl", "collective", "loopback"] = "auto"
    """How blocks move. `auto` offers every way that works here and says which: nixl (RDMA, NVLink,
    shared memory, TCP), then collective (torch.distributed: Gloo, or NCCL, which has never been
    run on devices here); two workers use the first they both have. `loopback` works only between
    workers of one process (tests)."""
    verify: Literal["off", "sample", "all"] = "off"
    """Compare checksums of the blocks read with their owner's: of none, of one in 16, of all."""
    seals: bool = True
    """A hand-off's blocks are usable as soon as a word in the owner's memory, read after them, says
    that they were held, instead of when the owner has answered. With nixl, without `verify`."""
    lease_s: float = Field(10.0, gt=0)
    """A lease whose prefill has ended lives this long after its last renewal."""
    read_timeout_s: float = Field(10.0, gt=0)
    """A read not ended by then fails, or later by a second for each 50 MB of it (with nixl also of
    those beside it); its target blocks stay quarantined until it ends."""
    connect_timeout_s: float = Field(3.0, gt=0)
    """First contact with a peer: connect and hello."""
    fetch: bool = True
    """Pull a missing prefix from another worker when that is predicted to beat recomputing it."""
    network_domain: str = Field("", max_length=256)
    """Where these workers are, as a name: a rack, a zone, an NVLink domain. KV moves within one
    where it can. Empty: each machine is one. `python -m cluster.worker` takes it as an option."""
