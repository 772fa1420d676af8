"""What a worker has brought from each of its peers and why some of it failed, and what became of
the leases that it gave them.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from core.errors import BatonError, DeadlineExceeded, TransferCause, TransferFailed
from core.fit import LinearFit
from core.ids import WorkerId
from kv_transfer.traffic import Traffic

_PRIOR_BASE_S = 0.002
_PRIOR_BYTES_PER_S = 4e9  # hopeful, so that a first fetch is tried and the fit learns

_KEEP = 4096
"""Peers, of which most are long gone."""


def transfer_cost() -> LinearFit:
    """Seconds by bytes of a hand-off, before the first was measured."""
    return LinearFit(_PRIOR_BASE_S, 1 / _PRIOR_BYTES_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStats:
    """One hand-off's reads. `seconds` is the time some read was under way, `hidden_s` the part of
    it before the owner's last announcement, while its prefill still ran. `sealed`: the owner was
    not waited for, as its seal was whole.
    """

    nbytes: int = 0
    blocks: int = 0
    descriptors: int = 0
    reads: int = 0
    seconds: float = 0.0
    hidden_s: float = 0.0
    sealed: bool = False


@dataclass(slots=True)
class PairMetrics:
    """Totals of one owner-reader pair, at the reader. Failures are by cause; expiry is one."""

    transport: str = ""
    handoffs: int = 0
    reads: int = 0
    nbytes: int = 0
    blocks: int = 0
    descriptors: int = 0
    seconds: float = 0.0
    hidden_s: float = 0.0
    sealed: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, stats: PullStats) -> None:
        """A hand-off whose blocks are usable."""
        self.handoffs += 1
        self.reads += stats.reads
        self.nbytes += stats.nbytes
        self.blocks += stats.blocks
        self.descriptors += stats.descriptors
        self.seconds += stats.seconds
        self.hidden_s += stats.hidden_s
        self.sealed += stats.sealed


class TransferMetrics:
    """All pairs of one reader. Owners that are gone stay: `keep` bounds how many. `traffic` is what
    the reads asked for and not ended bring, from all of them.
    """

    def __init__(self, keep: int = _KEEP) -> None:
        self._keep = keep
        self.pairs: dict[WorkerId, PairMetrics] = {}
        self.traffic = Traffic()

    def pair(self, owner_id: WorkerId) -> PairMetrics:
        """The totals of one pair; the oldest pair makes room for a new one."""
        if owner_id not in self.pairs and len(self.pairs) >= self._keep:
            del self.pairs[next(iter(self.pairs))]
        return self.pairs.setdefault(owner_id, PairMetrics())

    def failed(self, owner_id: WorkerId, error: BaseException) -> None:
        """A hand-off that brought nothing usable."""
        self.pair(owner_id).failures[_cause(error)] += 1


class LeaseEnd(StrEnum):
    """How a lease ended, as its owner counts it. CLOSED: its reader has the blocks, or there was
    nothing to hand off.
    """

    CLOSED = "closed"
    ABORTED = "aborted"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True)
class LeaseCounters:
    """Leases since the process started: `opened` is what `ended` adds up to and those still open.
    `by_reader` has the worker that was bound, "" where none was; readers that are gone stay, as
    `keep` bounds how many.
    """

    opened: int = 0
    ended: Counter[LeaseEnd] = field(default_factory=Counter)
    by_reader: dict[WorkerId, Counter[LeaseEnd]] = field(default_factory=dict)
    keep: int = _KEEP

    def end(self, reader: WorkerId, how: LeaseEnd) -> None:
        """The oldest pair makes room for a new one."""
        self.ended[how] += 1
        if reader not in self.by_reader and len(self.by_reader) >= self.keep:
            del self.by_reader[next(iter(self.by_reader))]
        self.by_reader.setdefault(reader, Counter())[how] += 1


def _cause(error: BaseException) -> str:
    match error:
        case TransferFailed():
            return error.cause
        case DeadlineExceeded():
            return "deadline"
        case BatonError():
            return error.code
        case Exception():
            return TransferCause.OTHER
        case _:
            return "cancelled"
