"""What is planned, and what a plan is."""

from dataclasses import dataclass, field
from enum import StrEnum

from engine.latency.base import LatencyModel
from router.config import RouterConfig
from router.policies.base import Slo
from simulator.workload.types import SimRequest


class Affinity(StrEnum):
    """How fast KV crosses nodes (DistServe, OSDI'24, section 4).

    HIGH: fast enough for any placement (its algorithm 1). LOW: prefill and decode workers that hand
    over to each other share a node, so KV stays on NVLink (its algorithm 2).
    """

    HIGH = "high"
    LOW = "low"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One way to build a worker: `tp` GPUs of one kind, and what they hold and take."""

    gpu: str
    tp: int
    latency: LatencyModel
    kv_tokens: int
    """Tokens of KV that fit beside the weights, all ranks together."""
    nic_bytes_per_s: float
    nvlink_bytes_per_s: float
    """Of all its GPUs, one way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """GPUs of a kind, at most `count` of them."""

    gpu: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is planned for.

    `requests` are offered at any rate by stretching their arrivals; `block_size` is that of their
    hashes. `share` of the requests keep both targets of `slo` at a rate that counts as served.
    `chunks` are the step budgets tried, in tokens. A run offers what comes in about `run_s` (see
    `simulator/plan/fleet.py`) and no fewer than `least_requests`; where `requests` are too few for
    it they are repeated with blocks of their own. Rates that would take more than `most_requests`
    are not tried.

    `router` decides in whole plans, as that of the cluster would: who is refused has missed its
    targets. Without admission every request is served, however late.
    """

    options: tuple[Option, ...]
    offers: tuple[Offer, ...]
    gpus: int
    slo: Slo
    share: float
    requests: tuple[SimRequest, ...]
    block_size: int
    kv_bytes_per_token: int
    affinity: Affinity = Affinity.HIGH
    node_gpus: int = 8
    chunks: tuple[int, ...] = (512, 2048, 8192)
    max_batch: int = 256
    router: RouterConfig = field(default_factory=RouterConfig)
    least_requests: int = 300
    most_requests: int = 8000
    run_s: float = 20.0
    warm_up: float = 0.1
    """Least share of a run's requests, the first ones, that is not counted."""
    width: float = 0.03
    """Relative width at which the search for a rate stops."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal workers of a plan."""

    option: Option
    step_tokens: int
    workers: int

    @property
    def gpus(self) -> int:
        return self.workers * self.option.tp


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Pools, `copies` times: with low affinity the pools are those of one node. A plan without a
    decode pool is colocated: its workers do both.
    """

    prefill: Pool
    decode: Pool | None
    copies: int = 1

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (self.prefill,) if self.decode is None else (self.prefill, self.decode)

    @property
    def gpus(self) -> int:
        """Of all copies."""
        return self.copies * sum(pool.gpus for pool in self.pools)

    @property
    def can_run(self) -> bool:
        """Whether there is a cluster config for it: an engine computes on one GPU per worker, and
        all workers have one kind of it.
        """
        kinds = {pool.option.gpu for pool in self.pools}
        one_gpu_each = all(pool.option.tp == 1 for pool in self.pools)
        return self.decode is not None and one_gpu_each and len(kinds) == 1


def scale_of(plan: Plan, fleet: Plan) -> float:
    """How many of the fleet are in one copy of the plan, by the scarcer pool."""
    return min(
        pool.workers / small.workers for pool, small in zip(plan.pools, fleet.pools, strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """The highest rate found at which enough requests keep their targets, and how they fared there.

    0 requests/s where no rate does; the other numbers are then those of the lowest rate tried.
    """

    rps: float
    share: float
    ttft_p90_s: float
    tpot_p90_s: float
    hit_share: float
    """Prompt tokens that were cached."""
    refused_share: float = 0.0
    """Requests that were answered 429."""
    at_least: bool = False
    """No rate tried was too high: it may serve more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A plan and what the simulator says of it: of `fleet`, which is one copy of it or fewer
    workers that stand for one.
    """

    plan: Plan
    fleet: Plan
    goodput: Goodput
    """Of the fleet."""

    @property
    def rps(self) -> float:
        """Of the plan, as many fleets as its scarcer pool has: a lower bound."""
        return self.goodput.rps * scale_of(self.plan, self.fleet) * self.plan.copies

    @property
    def rps_per_gpu(self) -> float:
        return self.rps / self.plan.gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best plans, best first, the best colocated one, and what a buyer must be told.

    `best` is empty where no disaggregated plan keeps the targets at any rate, `colocated` None
    where no colocated one does.
    """

    best: tuple[Rated, ...]
    colocated: Rated | None
    warnings: tuple[str, ...]
    simulated: int
    """Plans that were simulated as a whole."""

    @property
    def margin(self) -> float | None:
        """By what share the best is above the next."""
        if len(self.best) < 2:
            return None
        return self.best[0].rps_per_gpu / self.best[1].rps_per_gpu - 1
