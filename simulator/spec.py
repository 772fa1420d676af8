"""What is simulated: pools of workers, the network between them, routers, failures."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from kv_transfer.config import TransferConfig
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.worker import WorkerSpec

if TYPE_CHECKING:
    from simulator.keep import KeepPolicy


class PoolRole(StrEnum):
    """What a pool does; colocated workers compute a prompt and its answer, as most servers do, and
    stand beside prefill workers where prompts go.
    """

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """Equal workers. `ready_s`: when they are up."""

    name: str
    role: PoolRole
    workers: int
    worker: WorkerSpec
    ready_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """`control_s` is what closing a hand-off takes after its last byte. Workers are dealt to
    domains of `domain_workers` in order of their pools; 0 puts all into one.
    """

    control_s: float = 0.001
    uplink_bytes_per_s: float = 400e9
    domain_workers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A worker dies with all it holds. `restart_s` later another one is in its place, if any. A
    silent one ends no connection, so nobody hears of it: routers notice by its silence.
    """

    at_s: float
    pool: str
    worker: int
    restart_s: float | None = None
    silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """For so long nothing comes through between a worker and its peers; routers still reach it."""

    at_s: float
    pool: str
    worker: int
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSpec:
    """One run, but for its requests. The same seed and requests give the same run.

    With `report_s` a router hears of load and caches only every so often, as every worker reports;
    0 lets it see what is. `max_tokens` is what clients ask for at most. With `closed_sessions`
    turns wait for the answer before them, and at most `sessions` are open at once
    (simulator/clients.py). With `late_refusals` a prompt that its decode worker could not serve in
    time once it is computed ends there, its prefill wasted: a what-if, as a live client has its
    first token by then. With `moves_answers` running answers move between decode workers
    (simulator/balance.py): a what-if as well, as a live router moves one only when it is told to.
    """

    pools: tuple[PoolSpec, ...]
    router: RouterConfig = field(default_factory=RouterConfig)
    slo: Slo
    network: NetworkSpec = NetworkSpec()
    routers: int = 1
    report_s: float = 0.0
    max_tokens: int = 2048
    max_queued_tokens: int = 1_000_000
    max_sequences: int = 1024
    transfer: TransferConfig = field(default_factory=lambda: TransferConfig(fetch=False))
    failures: tuple[Failure, ...] = ()
    cuts: tuple[Cut, ...] = ()
    closed_sessions: bool = False
    sessions: int | None = None
    keep: "KeepPolicy | None" = None
    late_refusals: bool = False
    moves_answers: bool = False
    samples: int = 200
    seed: int = 0

    @property
    def gpus(self) -> int:
        """Of all pools."""
        return sum(pool.workers * pool.worker.gpus for pool in self.pools)
