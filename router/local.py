"""Whether a decode worker computes a prompt itself, without a prefill worker and a hand-off.

Worth it when a decode worker has nearly all of the prompt in its cache already, as it has in the
next turn of a conversation it answered: then the rest is less work than the hand-off around it. The
rest joins one step of the answers that run there, so that step must still keep their TPOT target.
Conditional disaggregation as in Dynamo and P/D-Serve; here both sides of the trade are predicted.
"""

from dataclasses import dataclass
from enum import StrEnum

from router.policies.base import Slo

_MOST_TOKENS = 512
"""Computed in one step of an engine with default settings."""
_MOST_SHARE = 0.25
"""Of the prompt. Of more, the prefill pool is what it is for."""


class LocalVerdict(StrEnum):
    """LOCAL, or why not; the label of its counter."""

    LOCAL = "local"
    OFF = "off"
    LONG = "long"
    """No decode worker has so much of the prompt that little is left."""
    UNMEASURED = "unmeasured"
    FULL = "full"
    """Its memory would not hold the sequence."""
    TPOT = "tpot"
    """The answers that run there would miss their target."""
    SLOWER = "slower"
    """A prefill worker is predicted to give the first token sooner, by more than a token takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalOption:
    """A decode worker that holds most of a prompt. All seconds are predictions."""

    prompt_tokens: int
    uncached_tokens: int
    measured: bool
    fits: bool
    step_s: float
    """A step of the answers there, this one included; 0 where none runs."""
    suffix_s: float
    """Computing the uncached tokens."""
    queue_s: float
    """Of prompts before it there."""
    elsewhere_s: float
    """To the first token at the prefill worker that would be chosen, its queue included."""


def is_short(uncached_tokens: int, prompt_tokens: int) -> bool:
    """Whether so little of a prompt is left that a decode worker may compute it."""
    return uncached_tokens <= min(_MOST_TOKENS, _MOST_SHARE * prompt_tokens)


def judge_local(option: LocalOption, slo: Slo) -> LocalVerdict:
    """LOCAL when it harms no running answer and is not slower."""
    here_s = option.queue_s + option.step_s + option.suffix_s
    if not is_short(option.uncached_tokens, option.prompt_tokens):
        return LocalVerdict.LONG
    if not option.measured:
        return LocalVerdict.UNMEASURED
    if not option.fits:
        return LocalVerdict.FULL
    if option.step_s + option.suffix_s > slo.tpot_s:
        return LocalVerdict.TPOT
    is_soon = here_s <= max(option.elsewhere_s, slo.tpot_s)
    return LocalVerdict.LOCAL if is_soon else LocalVerdict.SLOWER
