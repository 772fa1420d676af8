"""One choice's answer as its tokens arrive: text, stop strings, how it ended, when."""

import math

from core.clock import Clock
from core.sampling import FinishReason
from router.detokenize import Detokenizer
from router.requests import PlannedChoice
from router.stop_strings import StopMatcher
from router.types import Generated, Timings


class Answer:
    """Feed what the generator gives; stop when `finish` is set.

    A token that ends the answer has no text. A stop string ends it before the generator does.
    """

    __slots__ = (
        "_clock",
        "_detokenizer",
        "_first_s",
        "_last_s",
        "_matcher",
        "_started_s",
        "_timings",
        "cached_tokens",
        "finish",
        "num_tokens",
        "planned",
    )

    def __init__(
        self,
        planned: PlannedChoice,
        detokenizer: Detokenizer,
        stops: tuple[str, ...],
        clock: Clock,
        started_s: float,
    ) -> None:
        self.planned = planned
        self.finish: FinishReason | None = None
        self.num_tokens = 0
        self.cached_tokens = 0
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None
        self._clock = clock
        self._started_s = started_s
        self._first_s = math.nan
        self._last_s = math.nan
        self._timings: Timings | None = None

    @property
    def index(self) -> int:
        return self.planned.request.choice

    def push(self, token: int) -> str:
        """The text that one more token, not the first and not the last, makes certain."""
        self.num_tokens += 1
        piece = self._detokenizer.push(token)
        matcher = self._matcher
        if matcher is not None:
            piece = matcher.push(piece)
            if matcher.matched:
                self._end(FinishReason.STOP, None)
        return piece

    def feed(self, item: Generated) -> list[str]:
        """The pieces of text that `item` makes certain, at most one a token; none is empty."""
        if not self.num_tokens:
            self._first_s = self._clock.now_s()
        if item.cached_tokens:
            self.cached_tokens = item.cached_tokens
        tokens = item.tokens
        spoken = len(tokens)
        if item.finish is FinishReason.STOP and tokens:
            spoken -= tokens[-1] in self.planned.request.sampling.stop_token_ids
        pieces = []
        for token in tokens[:spoken]:
            piece = self.push(token)
            if piece:
                pieces.append(piece)
            if self.finish is not None:
                return pieces
        self.num_tokens += len(tokens) - spoken
        if item.finish is not None:
            pieces.extend(self._end(item.finish, item.timings))
        return pieces

    @property
    def ttft_s(self) -> float:
        return self._first_s - self._started_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first; None for an answer of one token."""
        if self.num_tokens < 2:
            return None
        return (self._last_s - self._first_s) / (self.num_tokens - 1)

    @property
    def timings(self) -> Timings:
        """The generator's; where a stop string ended the answer first, what was seen here."""
        return self._timings or Timings(
            ttft_s=self.ttft_s,
            decode_s=self._last_s - self._first_s,
            tpot_s=self.tpot_s or 0.0,
            cached_tokens=self.cached_tokens,
        )

    def _end(self, finish: FinishReason, timings: Timings | None) -> list[str]:
        """The text still held, which may itself complete a stop string."""
        self._last_s = self._clock.now_s()
        self._timings = timings
        self.finish = finish
        rest = self._detokenizer.finish()
        if self._matcher is not None:
            rest = self._matcher.push(rest) + self._matcher.flush()
            if self._matcher.matched:
                self.finish = FinishReason.STOP
        return [rest] if rest else []
