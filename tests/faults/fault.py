"""What a worker process of these tests is told: how to start, and what to do wrong."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """What one worker process is told when it is forked."""

    worker_id: str
    role: str
    config: str
    log: str
    ports: tuple[int, int] = (0, 0)
    """Of its doors for routers and for other workers."""
    environ: Mapping[str, str]


class Fault(StrEnum):
    """Armed for a number of times. A gate holds its place until it is told to go on."""

    # -- gates of the reader
    BEFORE_BIND = "before_bind"
    """A pull has not yet said anything to the owner."""
    BEFORE_READ = "before_read"
    """A read was asked for and is not posted: to its caller it is in progress."""
    IN_READ = "in_read"
    """The first half of a read has arrived, the second is not posted."""
    AFTER_READ = "after_read"
    """All bytes have arrived, the caller does not know."""

    # -- gate of the engine
    IN_STEP = "in_step"
    """The engine's thread is inside a step."""

    # -- the transport
    MEMORY_RAISES = "memory_raises"
    """Of the calls marked so, none may raise by the transport's contract."""
    CONNECT_FAILS = "connect_fails"
    READ_RAISES = "read_raises"
    """As MEMORY_RAISES."""
    READ_FAILS_AT_ONCE = "read_fails_at_once"
    READ_FAILS_LATER = "read_fails_later"
    DISCONNECT_FAILS = "disconnect_fails"
    DISCONNECT_RAISES = "disconnect_raises"
    """As MEMORY_RAISES: it fails otherwise than by TransferFailed."""
    TRANSPORT_FAILS = "transport_fails"
    """`failed` answers."""
    FAILED_RAISES = "failed_raises"
    """As MEMORY_RAISES."""
    CLOSE_RAISES = "close_raises"
    """As MEMORY_RAISES."""
    CLOSE_HANGS = "close_hangs"
    BYTE_FLIPPED = "byte_flipped"

    # -- what the owner says, and hears
    ANNOUNCEMENT_LOST = "announcement_lost"
    LAST_ANNOUNCEMENT_LOST = "last_announcement_lost"
    ANNOUNCEMENT_DOUBLED = "announcement_doubled"
    ANNOUNCEMENT_LATE = "announcement_late"
    """It overtakes none: the next one of its lease is sent before it."""
    CLOSE_LOST = "close_lost"
    CLOSED_LOST = "closed_lost"
    ABORT_LOST = "abort_lost"
    RENEWAL_WITHOUT_EFFECT = "renewal_without_effect"
    OWNER_MUTE = "owner_mute"
    STREAM_BROKEN = "stream_broken"
    """The owner's side of the PeerStream fails while it handles a message."""

    # -- protections taken away, for the controls
    ALWAYS_HELD = "always_held"
    """The closing question is always answered HELD."""
    SEALS_STAY = "seals_stay"
    """A seal is not broken when its lease ends."""
    NO_QUARANTINE = "no_quarantine"
    """Blocks under a running read are given back at once."""
    NO_FENCE = "no_fence"
    """A lease is bound without a look at whose it is."""
    LEASES_OF_THE_LOST = "leases_of_the_lost"
    """A stream that ends leaves its leases."""
    NO_EXPIRY = "no_expiry"
    """Leases are not looked at for their age."""
    LEAK = "leak"
    """Every pull loses memory and a descriptor."""
