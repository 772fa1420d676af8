"""Settings of the KV hand-off."""

from typing import Literal

from pydantic import Field

from core.config import Settings


class TransferConfig(Settings):
    """Leases and the transport that moves blocks."""

    backend: Literal["nixl", "loopback"] = "nixl"
    """`loopback` works only between workers of one process (tests)."""
    lease_s: float = Field(10.0, gt=0)
    """A lease whose prefill has ended lives this long after its last renewal."""
    read_timeout_s: float = Field(10.0, gt=0)
    """A read not ended by then fails; its target blocks stay quarantined until it ends."""
    connect_timeout_s: float = Field(3.0, gt=0)
    """First contact with a peer: connect and hello."""
