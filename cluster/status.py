"""What a running cluster is doing: each worker asked over its own door, and who holds which blocks.

A worker that does not answer is a line of the answer, not an error.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.config import ClusterConfig
from cluster.probe import SeenWorker
from cluster.ray_pools import worker_ids
from core.errors import BatonError
from core.registry import WorkerRecord

ASK_TIMEOUT_S = 3.0

_ABSENT = "not registered: it starts, is being replaced, or hangs; one that hangs is "
_REPLACED = "killed and started again after {timeout_s:g} s without an answer (hang_timeout_s)"
_KEPT = "not replaced until it is killed, as hang_timeout_s is 0, and its pid is in {worker_id}.log"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseStatus:
    """Blocks a prefill worker keeps for one sequence until its reader has them."""

    lease_id: int
    sequence_id: str
    reader: str
    """worker_id/incarnation#connection of the worker that reads; empty while nobody is bound."""
    blocks: int
    age_s: float
    expires_in_s: float | None
    """None while its prefill runs: then it cannot expire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """The pool of one worker: the first five sum to the total."""

    free: int
    cached: int
    in_use: int
    receiving: int
    quarantined: int
    held: int
    """Blocks with at least one lease, whatever their state."""

    @property
    def total(self) -> int:
        return self.free + self.cached + self.in_use + self.receiving + self.quarantined


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """What one worker, as a reader, has brought from one owner since it started."""

    owner_id: str
    transport: str
    handoffs: int
    reads: int
    nbytes: int
    blocks: int
    descriptors: int
    seconds: float
    hidden_s: float
    """Of `seconds`, the part that passed while the owner's prefill still ran."""
    sealed: int
    """Of `handoffs`, those for which the owner's answer was not waited for."""
    failures: dict[str, int]
    """By cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderStatus:
    """What became of the leases that one worker, as an owner, gave one reader. An empty
    `reader_id`: nobody was bound to them.
    """

    reader_id: str
    leases: dict[str, int]
    """By how they ended: closed, aborted, expired, withdrawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """What a worker says of itself."""

    role: str
    incarnation: str
    pid: int
    draining: bool
    waiting: int
    running: int
    queued_tokens: int
    context_tokens: int
    blocks: BlockCounts
    pool_error: str
    """Empty: every block is in exactly one state."""
    leases: tuple[LeaseStatus, ...]
    leases_opened: int
    leases_closed: int
    leases_aborted: int
    leases_expired: int
    leases_withdrawn: int
    readers: tuple[ReaderStatus, ...]
    transports: tuple[str, ...]
    """Ways to move blocks that it offers its peers, best first."""
    transfer_bytes: int
    transfer_blocks: int
    transfer_failures: int
    peers: tuple[PeerStatus, ...]
    preemptions: int
    metrics_address: str
    """host:port of its /metrics, empty where it serves none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One line of `baton status`. Without `stats` the worker did not answer; `problem` says why."""

    worker_id: str
    role: str
    address: str = ""
    problem: str = ""
    stats: WorkerStats | None = None


class WorkerControl(Protocol):
    """Control of one worker. A call ends within `timeout_s`, or raises Unavailable."""

    async def stats(self, address: str, timeout_s: float) -> WorkerStats: ...


async def collect(
    config: ClusterConfig, known: Sequence[WorkerRecord | SeenWorker], control: WorkerControl
) -> tuple[WorkerStatus, ...]:
    """Every worker the config asks for and every other one that is known, by worker_id."""
    expected = {str(worker_id): str(role) for worker_id, role in worker_ids(config).items()}
    names = {str(each.worker_id) for each in known}
    absent = [
        WorkerStatus(worker_id=worker_id, role=role, problem=_absent(worker_id, config))
        for worker_id, role in expected.items()
        if worker_id not in names
    ]
    present = await asyncio.gather(*(_ask(each, control) for each in known))
    return tuple(sorted([*absent, *present], key=lambda status: status.worker_id))


def _absent(worker_id: str, config: ClusterConfig) -> str:
    hanging = _REPLACED if config.hang_timeout_s else _KEPT
    return _ABSENT + hanging.format(worker_id=worker_id, timeout_s=config.hang_timeout_s)


async def _ask(record: WorkerRecord | SeenWorker, control: WorkerControl) -> WorkerStatus:
    worker_id, role, address = str(record.worker_id), str(record.role), record.address
    try:
        stats = await control.stats(address, ASK_TIMEOUT_S)
    except BatonError as error:
        return WorkerStatus(worker_id=worker_id, role=role, address=address, problem=error.message)
    return WorkerStatus(worker_id=worker_id, role=stats.role, address=address, stats=stats)
