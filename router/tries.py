"""How often one sequence is tried, and when what went wrong is its answer.

    no progress                 counts: `most` in a row are all
    more than the first token   the row begins anew: an answer may outlive any worker it runs on
    no room, where it has begun waits and counts as no try
    a fault of two workers      is taken for the sequence's own

The first token is the prefill's, so a sequence that kills whoever decodes it makes no progress. One
that kills them some tokens later does, and is stopped all the same: its `_MOST_ROWS`th row is its
last.
"""

from core.errors import NoWorkers, Overloaded, Unavailable, WorkerFailed
from router.types import PromptRefused

RETRY_PAUSE_S = 0.05
_MAX_PAUSE_S = 1.0
_PREFILL_TOKENS = 1
_MOST_ROWS = 8
_MOST_FAULTY = 2
"""Workers that fail at the same sequence."""


class Tries:
    """Of one sequence; the live router's and the simulator's."""

    __slots__ = ("_begun", "_faulty", "_most", "_pauses", "_row", "_rows")

    def __init__(self, most: int) -> None:
        self._most = most
        self._row = 0
        self._rows = 1
        self._pauses = 0
        self._begun = False
        self._faulty: set[str] = set()

    def may_follow(self, error: Unavailable, given_tokens: int) -> bool:
        """An attempt gave so many tokens, then failed: whether there may be another one."""
        if given_tokens > _PREFILL_TOKENS and self._rows < _MOST_ROWS:
            self._rows += 1
            self._row = self._pauses = 0
        # Where there was no worker, nothing has begun.
        waits = isinstance(error, Overloaded | NoWorkers)
        self._begun = self._begun or given_tokens > 0 or not waits
        self._row += not (self._begun and isinstance(error, Overloaded))
        if isinstance(error, WorkerFailed):
            self._faulty.add(error.worker_id)
        if isinstance(error, PromptRefused):
            self._pauses = max(1, self._pauses)
        return self._row < self._most and len(self._faulty) < _MOST_FAULTY

    def pause_s(self) -> float:
        """Before the next attempt: none at first, then longer each time."""
        pause_s = min(RETRY_PAUSE_S * self._pauses, _MAX_PAUSE_S)
        self._pauses += 1
        return pause_s
