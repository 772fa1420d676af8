"""When the engine of a worker is taken to hang, although its event loop is well.

A worker that dies ends its stream, and one whose process stands still says nothing. One of which
the engine's thread alone is stuck (a device that does not answer, a deadlock in a library) keeps
its stream and goes on reporting, and would keep what it runs until engine.step_timeout_s ends it.
So its reports tell for how long the step in flight has run, by its own clock: a pause of the router
makes no step older. It hangs while that is longer than a floor and than many times the longest step
that it and most workers of its kind have told of.

The first steps of an engine's life may take minutes, to compile or to load kernels. They are not
misjudged: a worker tells of no longest step before it has ended some of them, which count for
nothing (engine/longest.py), and until then it is not judged; if one of these hangs it takes
engine.step_timeout_s as before. Later a single step may be longer than all before it, as when
an input of a new shape is compiled for: the floor is for these, and many times the longest for
engines whose every step is long. If one is misjudged all the same, its sequences continue elsewhere
with the same text, and it takes new ones as soon as its step has ended.
"""

from collections.abc import Collection
from statistics import median_low

_MULTIPLE = 20.0


def hangs(
    step_age_s: float, own_longest_s: float, longest_s: Collection[float], floor_s: float
) -> bool:
    """Whether a step of that age hangs at a worker whose own longest took `own_longest_s` (0: it is
    cold), and those of the warm ones of its kind, itself among them, `longest_s`. Of these the
    median counts: one that has hung before makes no hang of another look usual. A floor of 0
    judges none.
    """
    if not floor_s or not own_longest_s:
        return False
    usual_s = max(own_longest_s, median_low(longest_s) if longest_s else 0.0)
    return step_age_s > max(floor_s, _MULTIPLE * usual_s)
