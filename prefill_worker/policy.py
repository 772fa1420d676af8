"""Decisions of the prefill role. Pure: values in, value out."""

import math
from dataclasses import dataclass
from enum import StrEnum

from core.errors import BatonError, InvalidRequest, Overloaded
from prefill_worker.config import PrefillConfig

_CONTROL_S = 0.002  # the question and the closing question: two round trips, two event loops
_CONTACT_S = 0.03  # connect, hello, and the transport's own greeting
_MARGIN = 1.25
_FORGET_S = 30.0
_PATIENCE = 4.0
_PATIENCE_FLOOR_S = 0.5


def refuse_prompt(
    num_tokens: int,
    capacity_tokens: int,
    queued_tokens: int,
    open_legs: int,
    config: PrefillConfig,
) -> BatonError | None:
    """Why a prompt cannot be taken now, or None.

    `capacity_tokens` is what this worker's arena and model hold at most, `queued_tokens` what has
    to be computed before, `open_legs` how many prompts are held. A worker with an empty queue, and
    fewer legs than it holds, takes any prompt that fits: else the longest would find none.
    """
    if num_tokens < 1:
        return InvalidRequest("the prompt has no tokens")
    if num_tokens > capacity_tokens:
        return InvalidRequest(
            f"the prompt has {num_tokens} tokens; this worker holds {capacity_tokens}"
        )
    if queued_tokens and queued_tokens + num_tokens > config.max_queued_tokens:
        return Overloaded(f"{queued_tokens} prompt tokens are queued already")
    if open_legs >= config.max_legs:
        return Overloaded(f"{open_legs} prompts are held already")
    return None


class FetchVerdict(StrEnum):
    """Whether to fetch a prefix from another worker; all but FETCH are reasons not to."""

    FETCH = "fetch"
    OFF = "off"
    NOTHING_MISSING = "nothing_missing"
    AVOIDED = "avoided"
    """The source failed a moment ago."""
    UNMEASURED = "unmeasured"
    """No prefill was measured here yet, so nothing is known to be worth saving."""
    SLOWER = "slower"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOption:
    """A prefix that another worker has and this one has not. All seconds are predictions."""

    missing_blocks: int
    first_contact: bool
    """Nothing was fetched from that worker yet."""
    transfer_s: float
    """Reading the missing blocks."""
    since_fetch_s: float
    """Age of the last fetch, which is that of the newest measurement behind `transfer_s`."""
    recompute_s: float
    """Prefill of the prompt from what is cached here."""
    rest_s: float
    """Prefill of what is left of it after the fetch."""
    measured_steps: int


def judge_fetch(option: FetchOption) -> FetchVerdict:
    """Mooncake's rule (FAST'25, algorithm 1): fetch when transfer and the rest of the prefill take
    less than the prefill of all. The transfer must win by a margin, as both sides are noisy.

    Whoever queues in front of the prompt is the same on both sides and cancels out.
    """
    if option.missing_blocks < 1:
        return FetchVerdict.NOTHING_MISSING
    if option.measured_steps < 1:
        return FetchVerdict.UNMEASURED
    if _MARGIN * _fetch_s(option) + option.rest_s >= option.recompute_s:
        return FetchVerdict.SLOWER
    return FetchVerdict.FETCH


def fetch_patience_s(option: FetchOption, remaining_s: float) -> float:
    """How long a fetch may take before the prompt is computed after all.

    Never longer than the prefill it is to save, but for a floor: on a busy machine a first contact
    takes some tenths of a second.
    """
    patience_s = _PATIENCE_FLOOR_S + min(_PATIENCE * _fetch_s(option), option.recompute_s)
    return max(0.0, min(remaining_s, patience_s))


def _fetch_s(option: FetchOption) -> float:
    """The whole fetch. What nobody tries nobody measures, so a slow reading is believed less with
    each half minute without a fetch, and one day tried again.
    """
    fixed_s = _CONTROL_S + (_CONTACT_S if option.first_contact else 0.0)
    return fixed_s + option.transfer_s * math.exp2(-option.since_fetch_s / _FORGET_S)
