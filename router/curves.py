"""What prefill and decode take on each kind of worker, learned from the answers' own times.

    prefill   seconds = steps * a + tokens * b + pairs * c        (as core/fit.py)
    decode    seconds of a step = a + sequences * b + context * c
    both      seconds of a step = prefill + beside * decode

The second is the form DistServe and xLLM fit (OSDI'24, section 4.2; arXiv 2510.14686). A step that
does both reads the weights once: what its decodes add to its chunk is a share of what they take
alone, learned from the prompts that decode workers compute. Predictions are arithmetic on frozen
coefficients, so that a decision may ask for a dozen of them.
"""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from sys import intern
from typing import NamedTuple

from core.fit import CostFit
from core.messages import WorkerHello
from core.step import STEP_TOKENS, StepWork, chunk_within

_QUEUE_PROMPT_TOKENS = 4096
"""A queue of tokens is priced as prompts of this length."""
_PREFILL_PRIOR = (3.91e-3, 1.424e-5, 1.5e-9)
_DECODE_PRIOR = (
    6.12e-3,
    9.1e-6,
    4.21e-8,
)  # both: Llama-3-8B on an H100; of it only the shape lasts
_LEARN_EVERY_S = 0.25
_ENOUGH_PREFILLS = 3
_OUTPUTS = 512
_QUANTILES = 16
_ENOUGH_OUTPUTS = 8
_SAME_SIZE = 0.1
_MAX_KINDS = 256
"""Known at once."""


class WorkerKind(NamedTuple):
    """What a worker tells of its machine. Those of one device and layout whose arenas differ by a
    few percent are taken to be equally fast: sized by what memory is free, no two arenas are alike.
    """

    device: str
    layout: str
    num_blocks: int
    """To three digits: a large fleet in which no two are alike still has few kinds."""
    is_colocated: bool = False
    """Its curves are of steps with all that is in them; see router/view.py."""


def kind_of(hello: WorkerHello, *, is_colocated: bool = False) -> WorkerKind:
    # Interned, as every decision looks up the kinds of a dozen workers, by comparing them.
    num_blocks = int(float(f"{hello.num_blocks:.2e}"))
    return WorkerKind(intern(hello.device), intern(str(hello.layout)), num_blocks, is_colocated)


@dataclass(frozen=True, slots=True)
class PrefillCurve:
    """Seconds per step, token and pair; see core.fit.PrefillCost."""

    step_s: float
    token_s: float
    pair_s: float
    queue_work_s: float = field(init=False, repr=False, compare=False)
    """Of one token that waits with others, all but what every step takes."""

    def __post_init__(self) -> None:
        queue_work_s = self.work_s(0, _QUEUE_PROMPT_TOKENS) / _QUEUE_PROMPT_TOKENS
        object.__setattr__(self, "queue_work_s", queue_work_s)

    def seconds(self, start: int, end: int, step_tokens: int = STEP_TOKENS) -> float:
        """To compute positions [start, end) of one prompt, so many a step, on an idle worker."""
        tokens = end - start
        if tokens <= 0:
            return 0.0
        return -(-tokens // step_tokens) * self.step_s + self.work_s(start, end)

    def of(self, work: StepWork) -> float:
        """Seconds of such steps, nothing else in them."""
        return work.steps * self.step_s + work.tokens * self.token_s + work.pairs * self.pair_s

    def work_s(self, start: int, end: int) -> float:
        """Of these, all but what every step takes."""
        return (end - start) * (self.token_s + self.pair_s * (start + end + 1) / 2)

    def chunk_tokens(
        self, step_s: float | None, beside_s: float, start: int, end: int, step_tokens: int
    ) -> int:
        """Of a prompt's [start, end), beside decodes that add `beside_s` to a step which a worker
        keeps within `step_s`; of its middle, where a chunk takes what it takes on average.
        """
        if step_s is None or not beside_s:
            return step_tokens
        room_s, middle = step_s - beside_s - self.step_s, (start + end) // 2
        return chunk_within(room_s, middle, self.token_s, self.pair_s, step_tokens)

    def queue_token_s(self, step_tokens: int = STEP_TOKENS) -> float:
        """Of one token that waits with others, where so many go into a step."""
        return self.step_s / step_tokens + self.queue_work_s


@dataclass(frozen=True, slots=True)
class DecodeCurve:
    """Seconds of a decode step: fixed, per sequence, per token of context."""

    step_s: float
    sequence_s: float
    context_token_s: float

    def seconds(self, sequences: int, context_tokens: int) -> float:
        return (
            self.step_s
            + sequences * self.sequence_s
            + max(0, context_tokens) * self.context_token_s
        )


class Speed:
    """The curves of one kind of worker, and the fits they are made of."""

    def __init__(self) -> None:
        self.prefill = PrefillCurve(*_PREFILL_PRIOR)
        self.decode = DecodeCurve(*_DECODE_PRIOR)
        self.prefill_fit = CostFit(_PREFILL_PRIOR, weight=0.1)
        self.decode_fit = CostFit(_DECODE_PRIOR, weight=0.1)
        self.beside = 1.0
        self.beside_fit = CostFit((1.0,))
        self.prefill_at_s = self.decode_at_s = -_LEARN_EVERY_S


class Curves:
    """Fits per kind of worker, and the lengths of recent answers. Learning is rationed: a fit takes
    at most one observation per 0.25 s, as each costs tens of microseconds; but the first few at
    once, as until then nothing is predicted.
    """

    def __init__(self) -> None:
        self._kinds: dict[WorkerKind, Speed] = {}
        self._outputs: deque[int] = deque(maxlen=_OUTPUTS)
        self._residuals: tuple[int, ...] = ()
        self._fresh = 0

    def of(self, kind: WorkerKind) -> Speed:
        """What is known of this kind; the prior before the first observation."""
        known = self._kinds.get(kind)
        if known is None:
            known = self._like(kind) or Speed()
            if len(self._kinds) >= _MAX_KINDS:
                del self._kinds[next(iter(self._kinds))]
            self._kinds[kind] = known
        return known

    def _like(self, kind: WorkerKind) -> Speed | None:
        """Of the known ones that are as fast the one that is most like it."""
        alike = (
            other for other in self._kinds if other._replace(num_blocks=kind.num_blocks) == kind
        )
        sizes = [other.num_blocks for other in alike]
        nearest = min(sizes, key=lambda size: abs(size - kind.num_blocks), default=0)
        if abs(nearest - kind.num_blocks) > _SAME_SIZE * kind.num_blocks:
            return None
        return self._kinds.get(kind._replace(num_blocks=nearest))

    def _learning(self, kind: WorkerKind) -> Speed:
        """As `of`; of all kinds the one that has learned nothing for longest is forgotten first."""
        known = self.of(kind)
        self._kinds[kind] = self._kinds.pop(kind)
        return known

    def measured(self, kind: WorkerKind) -> bool:
        """Whether the prefill curve rests on prompts of such workers, not on a guess."""
        return self.of(kind).prefill_fit.observed >= _ENOUGH_PREFILLS

    def saw_prefill(self, kind: WorkerKind, work: StepWork, seconds: float, now_s: float) -> None:
        """Steps with that work, of one prompt or of several, took `seconds`."""
        known = self.of(kind)
        is_early = now_s - known.prefill_at_s < _LEARN_EVERY_S and self.measured(kind)
        if is_early or not work.tokens:
            return
        self._learning(kind).prefill_at_s = now_s
        known.prefill_fit.add(work, seconds)
        known.prefill = PrefillCurve(*known.prefill_fit.coefficients)

    def set_prefill(self, kind: WorkerKind, curve: PrefillCurve) -> None:
        """Take a curve as given, until observations replace it."""
        self.of(kind).prefill = curve

    def saw_decode(
        self, kind: WorkerKind, sequences: int, context_tokens: int, step_s: float, now_s: float
    ) -> None:
        """Steps took `step_s` each with about so many sequences and tokens of context."""
        known = self.of(kind)
        if now_s - known.decode_at_s < _LEARN_EVERY_S:
            return
        self._learning(kind).decode_at_s = now_s
        known.decode_fit.add((1.0, sequences, context_tokens), step_s)
        known.decode = DecodeCurve(*known.decode_fit.coefficients)

    def saw_beside(self, kind: WorkerKind, decode_s: float, added_s: float) -> None:
        """Decodes that take `decode_s` alone added `added_s` to the steps of a prompt."""
        known = self.of(kind)
        known.beside_fit.add((decode_s,), max(0.0, added_s))
        known.beside = known.beside_fit.coefficients[0]

    def saw_output(self, tokens: int) -> None:
        """An answer ended after so many."""
        self._outputs.append(tokens)
        self._fresh += 1
        if self._fresh >= max(_ENOUGH_OUTPUTS, len(self._outputs) // 8):
            self._fresh = 0
            self._residuals = residual_quantiles(tuple(self._outputs))

    @property
    def residuals(self) -> tuple[int, ...]:
        """See residual_quantiles; empty before enough answers have ended."""
        return self._residuals

    @property
    def steps_to_go(self) -> int:
        """Of the median running answer; 0 before enough answers have ended."""
        return self._residuals[len(self._residuals) // 2 - 1] if self._residuals else 0


def residual_quantiles(lengths: tuple[int, ...], count: int = _QUANTILES) -> tuple[int, ...]:
    """What running answers still have to go: the k-th value is reached by k of `count` of them.

    Of answers with these lengths, seen at a random moment, the share with more than r to go is
    sum(max(0, length - r)) / sum(lengths) (renewal theory's residual life). Descending.
    """
    ordered = sorted(lengths)
    total = sum(ordered)
    if not total:
        return (0,) * count
    above = [0]  # above[i] is the sum of the i longest
    for length in reversed(ordered):
        above.append(above[-1] + length)
    quantiles: list[int] = []
    for k in range(1, count + 1):
        low, high = 0, ordered[-1]
        while low < high:
            r = (low + high) // 2
            longer = len(ordered) - bisect_right(ordered, r)
            if (above[longer] - longer * r) * count > total * k:
                low = r + 1
            else:
                high = r
        quantiles.append(low)
    return tuple(quantiles)


def peak_tokens(context_tokens: int, sequences: int, residuals: tuple[int, ...]) -> float:
    """The most KV that `sequences` running sequences will need, in tokens.

    Past-Future's M* = max_i (sum of the i longest-lived contexts + i * r_i), r_i the i-th longest
    time to go (ASPLOS'25), with what a router knows: contexts of equal length, and residuals from
    recent answers instead of a sample per sequence.
    """
    count = len(residuals)
    if not count:
        return float(context_tokens)
    return max(
        (context_tokens + sequences * to_go) * k / count for k, to_go in enumerate(residuals, 1)
    )
