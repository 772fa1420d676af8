"""Whether one worker both computes a prompt and decodes its answer, without a hand-off.

Splitting the phases keeps long prompts from delaying running answers, and strands what either pool
has to spare. So it is decided per prompt, by prediction: a decode worker takes one that gets its
first token clearly sooner there, its cache and both queues counted, as long as the answers that run
there keep their TPOT target. That is a mean over an answer: a step with a chunk may take longer
than the target, if enough of the answer's steps have none. Conditional disaggregation as in Dynamo,
by the load of either side as in xLLM (arXiv 2510.14686) and Splitwise's borrowed machines
(ISCA'24); here both sides of the trade are predicted.

Where none does, the answer may still stay at the prefill worker chosen for the prompt, if that has
nearly all of it cached and less to run than a decode worker. What takes long to compute there would
delay the prompts behind it, so how much is cached decides first: of the rules tried, the one that
loses on neither of two traces (docs/headline.md).
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from router.decode_load import DecodeLoad
from router.place import Beside
from router.policies.base import Slo

STAYS_CACHED = 0.9
"""Share of a prompt."""
_SOONER = 1.6
"""So many times sooner than at the prefill worker the first token must come: a prompt that is
computed beside answers makes them slower, and keep their memory for longer. With 1 two of four
traces lose, 1.6 and 2 are level (docs/headline.md).
"""


class LocalVerdict(StrEnum):
    """LOCAL or STAYS, or why a decode worker does not; the label of its counter."""

    LOCAL = "local"
    """A decode worker computes the prompt."""
    STAYS = "stays"
    """Its prefill worker decodes the answer."""
    OFF = "off"
    NOBODY = "nobody"
    """No decode worker may be chosen."""
    UNMEASURED = "unmeasured"
    FULL = "full"
    """Its memory would not hold the sequence."""
    TPOT = "tpot"
    """The answers that run there would miss their target."""
    SLOWER = "slower"
    """The first token is not predicted to come so much sooner that answers should wait for it."""


class LocalOption(NamedTuple):
    """A prompt at a decode worker. All seconds are predictions."""

    measured: bool
    fits: Callable[[], bool]
    """Whether its memory holds the sequence; asked last, as it costs most."""
    beside: Beside
    steps_to_go: int
    """Steps the median answer there has still to go; 0 where that is not known."""
    elsewhere_s: float
    """To the first token at the prefill worker that would be chosen, its queue included."""


class StayOption(NamedTuple):
    """A prompt at the prefill worker chosen for it, as a place for its answer."""

    measured: bool
    fits: Callable[[], bool]
    beside: Beside
    steps_to_go: int
    """As a LocalOption's."""
    here: DecodeLoad | None
    """With all that runs there or is on its way, also prompts that will leave; None where that is
    not known.
    """
    elsewhere: DecodeLoad | None
    """Likewise, of the better of two decode workers."""


def judge_local(option: LocalOption, slo: Slo) -> LocalVerdict:
    """LOCAL when it harms no running answer and is clearly sooner."""
    if not option.measured:
        return LocalVerdict.UNMEASURED
    if _SOONER * option.beside.first_token_s > max(option.elsewhere_s, slo.tpot_s):
        return LocalVerdict.SLOWER
    if option.beside.decode_s and option.beside.mean_step_s(option.steps_to_go) > slo.tpot_s:
        return LocalVerdict.TPOT
    return LocalVerdict.LOCAL if option.fits() else LocalVerdict.FULL


def judge_stay(option: StayOption, slo: Slo) -> bool:
    """Of a prompt of which STAYS_CACHED is cached there."""
    here, elsewhere = option.here, option.elsewhere
    if not option.measured or here is None or elsewhere is None or here.share >= elsewhere.share:
        return False
    there = option.beside
    keeps = not there.decode_s or there.mean_step_s(option.steps_to_go) <= slo.tpot_s
    return keeps and option.fits()
