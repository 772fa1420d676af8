"""What an engine's longest steps take, for those who ask whether one that goes on still runs."""

_COLD_STEPS = 16
"""At first memory is mapped, kernels are loaded or compiled: such a step tells of no other."""
_SPAN_STEPS = 8192
"""Those of one span to two are looked back on."""


class LongestStep:
    """The second longest of the last steps: the longest one may have hung for a while, and would
    make the next one that does so look usual.
    """

    def __init__(self) -> None:
        self._cold = _COLD_STEPS
        self._steps = 0
        self._now: list[float] = []
        """The two longest of this span, the longer one first; then of the one before."""
        self._before: list[float] = []

    @property
    def seconds(self) -> float:
        """0 until enough steps have ended."""
        longest = sorted((*self._now, *self._before), reverse=True)
        return longest[1] if len(longest) > 1 else 0.0

    def add(self, seconds: float) -> None:
        """A step has ended."""
        if self._cold:
            self._cold -= 1
            return
        if len(self._now) < 2 or seconds > self._now[1]:
            self._now = sorted((*self._now, seconds), reverse=True)[:2]
        self._steps += 1
        if self._steps == _SPAN_STEPS:
            self._now, self._before, self._steps = [], self._now, 0
