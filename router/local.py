"""Whether a decode worker computes a prompt itself, without a prefill worker and a hand-off.

Splitting the phases keeps long prompts from delaying running answers, and strands what either pool
has to spare. So it is decided per prompt, by prediction: a decode worker takes one that gets its
first token sooner there, its cache and both queues counted, as long as the answers that run there
keep their TPOT target. That is a mean over an answer: a step with a chunk may take longer than the
target, if enough of the answer's steps have none. Conditional disaggregation as in Dynamo, by the
load of either side as in xLLM (arXiv 2510.14686) and Splitwise's borrowed machines (ISCA'24); here
both sides of the trade are predicted.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from router.place import Beside
from router.policies.base import Slo


class LocalVerdict(StrEnum):
    """LOCAL, or why not; the label of its counter."""

    LOCAL = "local"
    OFF = "off"
    NOBODY = "nobody"
    """No decode worker may be chosen."""
    UNMEASURED = "unmeasured"
    FULL = "full"
    """Its memory would not hold the sequence."""
    TPOT = "tpot"
    """The answers that run there would miss their target."""
    SLOWER = "slower"
    """A prefill worker is predicted to give the first token sooner, by more than a token takes."""


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

    @property
    def mean_step_s(self) -> float:
        """Of an answer there, over the steps it has still to go or those with a chunk."""
        there = self.beside
        return there.decode_s + there.delay_s / max(1.0, there.chunk_steps, self.steps_to_go)


def judge_local(option: LocalOption, slo: Slo) -> LocalVerdict:
    """LOCAL when it harms no running answer and is not slower."""
    if not option.measured:
        return LocalVerdict.UNMEASURED
    if option.beside.first_token_s > max(option.elsewhere_s, slo.tpot_s):
        return LocalVerdict.SLOWER
    if option.beside.decode_s and option.mean_step_s > slo.tpot_s:
        return LocalVerdict.TPOT
    return LocalVerdict.LOCAL if option.fits() else LocalVerdict.FULL
