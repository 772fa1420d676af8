"""The seam of placement: what a policy may ask about a request and the workers, and its answer.

The router asks a policy to `choose`, which remembers nothing of the request (what it keeps may
follow the pool), and tells it with `placed` once the request was submitted where it chose. A query
answers lazily, so that a decision costs what it looks at, not what there is: `pool` is one object
for as long as no worker comes or goes. Randomness and time come with the query; the live router and
the replay ask the same policies the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol

from core.ids import BlockHash, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency targets of a request's class."""

    ttft_s: float
    tpot_s: float


class Query(Protocol):
    """What both kinds of placement ask. All workers answered or taken as arguments are of `pool`.

    At least one of them is open; a policy answers an open one.
    """

    @property
    def pool(self) -> Sequence[WorkerId]:
        """All routable workers of the role, in a stable order."""
        ...

    @property
    def random(self) -> Random: ...

    @property
    def now_s(self) -> float:
        """Monotonic."""
        ...

    @property
    def slo(self) -> Slo: ...

    def is_open(self, worker: WorkerId) -> bool:
        """Whether it may be chosen: this request has not failed there."""
        ...

    def sequences(self, worker: WorkerId) -> int:
        """Sequences that wait or run there."""
        ...


class PrefillQuery(Query, Protocol):
    """One prompt that wants a prefill worker."""

    @property
    def tokens(self) -> int: ...

    @property
    def hashes(self) -> Sequence[BlockHash]:
        """Of its full blocks."""
        ...

    @property
    def block_size(self) -> int: ...

    def holders(self, limit: int) -> Sequence[WorkerId]:
        """A few open workers that hold the longest prefixes of it, longest first."""
        ...

    def cached_tokens(self, worker: WorkerId) -> int:
        """Tokens of the prompt whose KV it holds, as far as the router knows; never all."""
        ...

    def queued_tokens(self, worker: WorkerId) -> int:
        """Uncached prompt tokens in front of this one."""
        ...

    def ttft_s(self, worker: WorkerId) -> tuple[float, float]:
        """Seconds that those will take, and that the prompt's own uncached tokens will take."""
        ...

    def coming(self, limit: int) -> Sequence[WorkerId]:
        """A few open workers that will hold the longest prefix of it which prompts on their way
        will leave anywhere.
        """
        ...

    def expected_s(self, worker: WorkerId) -> tuple[float, float]:
        """As `ttft_s`, where what such prompts will leave there counts as cached."""
        ...

    def fastest_s(self, workers: Sequence[WorkerId]) -> Sequence[float]:
        """What the prompt's uncached tokens at each of these, as `expected_s` counts them, would
        take the fastest of them, with nothing beside; empty where all are equally fast.
        """
        ...


class DecodeQuery(Query, Protocol):
    """One sequence that wants a decode worker."""

    @property
    def near(self) -> Sequence[WorkerId]:
        """Workers in the network domain of its KV; empty where that tells nothing."""
        ...

    def context_tokens(self, worker: WorkerId) -> int:
        """Tokens of context of the sequences there."""
        ...

    def fits(self, worker: WorkerId) -> bool:
        """Whether the predicted peak of its KV, this sequence included, stays within its arena."""
        ...

    def free_tokens(self, worker: WorkerId) -> int:
        """Tokens its free and evictable blocks hold."""
        ...

    def tpot_s(self, worker: WorkerId) -> float:
        """Predicted seconds per token there, this sequence included."""
        ...


class Scored(NamedTuple):
    """One candidate and its cost; lower is better. `terms` are what the cost is made of."""

    worker_id: WorkerId
    cost: float
    terms: tuple[tuple[str, float], ...] = ()


class Decision(NamedTuple):
    """The choice, what it was chosen from, and the rule that decided."""

    worker_id: WorkerId
    candidates: Sequence[Scored]
    rule: str = ""

    def explain(self) -> str:
        """One line: the choice, the rule, then each candidate with its cost and terms."""
        parts = [self.worker_id, f"by {self.rule}:" if self.rule else "of"]
        for candidate in self.candidates:
            terms = " ".join(f"{name}={value:.6g}" for name, value in candidate.terms)
            parts.append(f"{candidate.worker_id}={candidate.cost:.4g}({terms})")
        return " ".join(parts)


class PrefillPolicy(Protocol):
    def choose(self, query: PrefillQuery) -> Decision: ...

    def placed(self, query: PrefillQuery, decision: Decision) -> None:
        """The prompt was submitted there."""
        ...


class DecodePolicy(Protocol):
    def choose(self, query: DecodeQuery) -> Decision: ...

    def placed(self, query: DecodeQuery, decision: Decision) -> None:
        """The sequence was submitted there."""
        ...


class Stateless:
    """For policies that remember nothing."""

    def placed(self, query: Query, decision: Decision) -> None:
        pass


def cost_of(candidate: Scored) -> float:
    return candidate.cost


def cheapest(candidates: Sequence[Scored], rule: str = "") -> Decision:
    """The first of the lowest cost."""
    best = min(candidates, key=cost_of)
    return Decision(best.worker_id, candidates, rule)


def by_ttft(query: PrefillQuery, worker: WorkerId) -> Scored:
    """Its cost is the predicted seconds to the first token."""
    queue_s, work_s = query.ttft_s(worker)
    return Scored(worker, queue_s + work_s, (("queue_s", queue_s), ("work_s", work_s)))


def open_workers(query: Query) -> list[WorkerId]:
    """All open ones in random order, so that the first of equals is any of them: O(pool)."""
    order = [worker for worker in query.pool if query.is_open(worker)]
    query.random.shuffle(order)
    return order


def sample(query: Query, count: int, among: Sequence[WorkerId] | None = None) -> list[WorkerId]:
    """Up to `count` different open workers, drawn evenly. Costs what it draws, not the pool:
    only where most draws meet the same or closed ones, in small pools, are all looked at.
    """
    pool = query.pool if among is None else among
    found: list[WorkerId] = []
    draw, size = query.random.random, len(pool)
    for _ in range(4 * count if size > count else 0):
        worker = pool[int(draw() * size)]
        if worker not in found and query.is_open(worker):
            found.append(worker)
            if len(found) == count:
                return found
    left = [worker for worker in pool if query.is_open(worker)]
    if len(left) == 1:
        return left
    return query.random.sample(left, min(count, len(left)))
