"""How long a process that has ended waits for its next start: longer each time, until one has
served for a while. What it took to start does not count: a model that loads for minutes and then
fails would be loaded again at once, for ever.
"""

from core.clock import Clock

_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0


class Backoff:
    """Of one process, over all its lives: `began`, perhaps `serves`, and `pause_s` at the end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._serves_since_s: float | None = None
        self.failures = 0
        """Ends in a row of a life that had not served for a minute."""

    def began(self) -> None:
        """A life begins."""
        self._serves_since_s = None

    def serves(self) -> None:
        """It takes requests."""
        self._serves_since_s = self._clock.now_s()

    def pause_s(self) -> float:
        """It has ended: seconds to its next start."""
        since_s = self._serves_since_s
        if since_s is not None and self._clock.now_s() - since_s > _STEADY_S:
            self.failures = 0
        self.failures += 1
        return _PAUSES_S[min(self.failures, len(_PAUSES_S)) - 1]
