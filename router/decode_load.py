"""What a prompt would find where it is to decode, by its TPOT target and the memory: 1 is full.

A prompt that no decode worker can serve in time is refused before it is computed, or its prefill
was for nothing (early rejection; Mooncake, arXiv 2407.00079, section 7.2). It comes there only when
its prefill is done, so two moments may be looked at:

    now    those that run. It says nothing of the prompts on their way: while they are computed all
           that come are let in, then all are refused, and prefill and decode load swing against
           each other (its section 7.3)
    then   when its prefill will be done: of those on their way some have come, of those that run
           some have ended (its section 7.4)

The paper has all answers end after one uniform time. Here the share that has not ended comes from
the lengths of recent answers (router/curves.py); where these are equal that is the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

from router.curves import DecodeCurve

_AIM = 0.9
"""Of the target: those who decode together share their steps, so at the target itself half of them
would miss it.
"""


_LEAST_STEP_S = 1e-6


class Decoding(NamedTuple):
    """The sequences of one decode worker, and the KV it has room for."""

    running: int
    coming: int
    """On their way there, or waiting; taken to be as long as those that run."""
    context_tokens: int
    """Of both."""
    room_tokens: int


class Then(NamedTuple):
    """In `after_s`, when so much of what is on its way will have come."""

    after_s: float
    due_share: float


class Pace(NamedTuple):
    """What a step takes there, what answers have still to go (curves.residual_quantiles), and the
    target.
    """

    curve: DecodeCurve
    residuals: tuple[int, ...]
    tpot_s: float


class DecodeLoad(NamedTuple):
    """`share` of what keeps the target and fits, the prompt included; above 1 it would not. By
    `drain_s` enough of those there will have ended. Whoever would be alone is never too much, and a
    target that the prompt would miss alone is no reason to keep it out.
    """

    share: float
    drain_s: float


def load_now(there: Decoding, tokens: int, pace: Pace) -> DecodeLoad:
    """Beside those that run, were a prompt of so many tokens to come now."""
    return _load(there, there.running, tokens, pace)


def load_then(there: Decoding, tokens: int, pace: Pace, then: Then) -> DecodeLoad:
    """As it will be then; who comes meanwhile has not ended."""
    step_s = pace.curve.seconds(there.running, round(_part(there, there.running)))
    left = there.running * share_left(pace.residuals, then.after_s / max(_LEAST_STEP_S, step_s))
    return _load(there, left + there.coming * then.due_share, tokens, pace)


def share_left(residuals: Sequence[int], steps: float) -> float:
    """Of answers that run now, those that have not ended after so many steps."""
    if steps <= 0:
        return 1.0
    longer = sum(residual >= steps for residual in residuals)
    if longer in (0, len(residuals)):
        return float(longer > 0 or not residuals)
    above, below = residuals[longer - 1], residuals[longer]
    return (longer + (above - steps) / (above - below)) / len(residuals)


def _load(there: Decoding, beside: float, tokens: int, pace: Pace) -> DecodeLoad:
    """With so many of those there beside it."""
    others = round(beside)
    if not others:
        return DecodeLoad(0.0, 0.0)
    curve, aim_s, residuals = pace.curve, _AIM * pace.tpot_s, pace.residuals
    context_tokens = round(_part(there, beside) + tokens)
    share = context_tokens / there.room_tokens
    if curve.seconds(1, tokens) <= aim_s:
        share = max(share, curve.seconds(others + 1, context_tokens) / aim_s)
    if share <= 1.0 or not residuals:
        return DecodeLoad(share, 0.0)
    to_go = residuals[int(len(residuals) / share)]  # all but 1 / share have ended by then
    return DecodeLoad(share, to_go * pace.tpot_s)


def _part(there: Decoding, sequences: float) -> float:
    """The context of so many of them."""
    return there.context_tokens * sequences / max(1, there.running + there.coming)
