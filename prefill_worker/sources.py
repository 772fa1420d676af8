"""What a prefill worker knows of fetching prefixes: what it takes, and who failed a moment ago.

It weighs; whoever drives it fetches, live by prefix.py and under a virtual clock by the simulator.
"""

from collections.abc import Callable
from dataclasses import dataclass

from core.errors import TransferCause
from core.fit import PrefillCost
from core.ids import Incarnation
from core.messages import PrefixSource
from prefill_worker.policy import FetchOption, FetchVerdict, fetch_patience_s, judge_fetch

_AVOID_S = 10.0
_CONTACTS = 4096
_HARMLESS = frozenset({TransferCause.NOT_HELD, TransferCause.NO_MEMORY, TransferCause.OWNER_ENDED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A prompt as far as fetching goes: `blocks` of it may come from elsewhere, `cached_blocks` are
    here, and it must have its first token within `remaining_s`.
    """

    context_tokens: int
    blocks: int
    cached_blocks: int
    remaining_s: float


@dataclass(frozen=True, slots=True)
class Weighed:
    """Where the verdict is FETCH, for how long to try."""

    verdict: FetchVerdict
    patience_s: float = 0.0


class Sources:
    """One worker's memory of the others. `predict_s` says what reading so many bytes takes."""

    def __init__(
        self,
        *,
        cost: PrefillCost,
        predict_s: Callable[[int], float],
        block_size: int,
        block_bytes: int,
        enabled: bool,
        now_s: float,
    ) -> None:
        self._cost = cost
        self._predict_s = predict_s
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._enabled = enabled
        self._fetched_at_s = now_s
        self._avoided: dict[Incarnation, float] = {}
        self._contacts: dict[Incarnation, None] = {}  # a set in order of age

    def weigh(self, wanted: Wanted, source: PrefixSource, now_s: float) -> Weighed:
        """Whether to fetch from there now."""
        size, cached = self._block_size, wanted.cached_blocks
        there = min(source.num_blocks, wanted.blocks)
        option = FetchOption(
            missing_blocks=there - cached,
            first_contact=source.incarnation not in self._contacts,
            transfer_s=self._predict_s((there - cached) * self._block_bytes),
            since_fetch_s=now_s - self._fetched_at_s,
            recompute_s=self._cost.predict_s(cached * size, wanted.context_tokens),
            rest_s=self._cost.predict_s(there * size, wanted.context_tokens),
            measured_steps=self._cost.observed_steps,
        )
        verdict = judge_fetch(option)
        if not self._enabled:
            verdict = FetchVerdict.OFF
        elif verdict is FetchVerdict.FETCH and self._avoided.get(source.incarnation, 0.0) > now_s:
            verdict = FetchVerdict.AVOIDED
        if verdict is not FetchVerdict.FETCH:
            return Weighed(verdict)
        return Weighed(verdict, fetch_patience_s(option, wanted.remaining_s))

    def ended(self, now_s: float) -> None:
        """A fetch has, well or badly."""
        self._fetched_at_s = now_s

    def met(self, source: Incarnation) -> None:
        """The next fetch from there finds a connection."""
        self._contacts.setdefault(source)
        if len(self._contacts) > _CONTACTS:
            del self._contacts[next(iter(self._contacts))]

    def fell_short(self, source: Incarnation, cause: TransferCause | None, now_s: float) -> None:
        """A fetch failed, None: out of time. A source whose fault it may be is left alone."""
        if cause in _HARMLESS:
            return
        self._contacts.pop(source, None)
        self._avoided = {k: until_s for k, until_s in self._avoided.items() if until_s > now_s}
        self._avoided[source] = now_s + _AVOID_S
