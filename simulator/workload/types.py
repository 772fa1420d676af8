"""What a simulated cluster is asked: requests and when they come."""

from dataclasses import dataclass

from core.ids import BlockHash


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request. `hashes` are those of the prompt's full blocks, chained; empty shares nothing.

    `output_tokens` (>= 1) is what it will generate, which nobody is told before it ends. A request
    with a `think_s` comes so many seconds after the answer before it in its session ended, if the
    loop is closed; in an open loop, all come at their `at_s`.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[BlockHash, ...] = ()
    session: str = ""
    think_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests by arrival. `horizon_s` is the time they cover, from 0."""

    name: str
    block_size: int
    requests: tuple[SimRequest, ...]
    horizon_s: float
