"""What the sequences of a decode worker will still grow into, in blocks: two ways to say it. Pure.

    limit   all that clients allow them to generate
    peak    the most that is predicted to be held at once. Past: the lengths of answers that ended
            here say how long each may go on. Future: the shortest ends first and gives its blocks
            back, so with r_1 >= r_2 >= ... tokens to go the peak is

                max_i (sum of the first i contexts + i * r_i)

The second is Past-Future's (ASPLOS'25). It draws a length for each sequence at every step; here its
place among the lengths is fixed by its place among the sequences, evenly spread: who looks at every
step with new luck is let in by the best of many draws. Neither is what pulls ask today, which leave
a block for each that runs, and what somebody has waited for (policy.py): see row 14 in
docs/reproduction.md for why not.
"""

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_ENOUGH = 16
"""Answers have to end before their lengths are a prediction."""
_RESERVE = 0.05
"""Share of the blocks that a predicted peak leaves free."""
_LENGTHS = 512
_SPREAD = 0.6180339887498949
"""Its multiples, without their whole parts, are evenly spread however many there are."""


class Held(NamedTuple):
    """A sequence that has KV here, or is about to; tokens."""

    known: int
    generated: int
    most: int
    """Still to come, as far as its client allows."""


class PastLengths:
    """Of the last answers that ended here, ascending."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self.ordered: list[int] = []

    def ended(self, tokens: int) -> None:
        """An answer of so many."""
        if len(self._recent) == _LENGTHS:
            eldest = self._recent.popleft()
            del self.ordered[bisect_right(self.ordered, eldest) - 1]
        self._recent.append(tokens)
        insort(self.ordered, tokens)


def limit_headroom_blocks(held: Iterable[Held], block_size: int) -> int:
    """Beside the blocks `held` have now, or are about to have."""
    return sum(_blocks(s.known + s.most, block_size) - _blocks(s.known, block_size) for s in held)


def peak_headroom_blocks(held: Iterable[Held], past: Sequence[int], block_size: int) -> int:
    """As `limit_headroom_blocks`; `past` is ascending, and not empty."""
    growing = sorted(
        ((_to_go(one, past, i * _SPREAD % 1), one.known) for i, one in enumerate(held)),
        reverse=True,
    )
    tokens = peak = 0
    for i, (to_go, known) in enumerate(growing, 1):
        tokens += known
        peak = max(peak, _blocks(tokens + i * to_go, block_size) + i)
    return peak - sum(_blocks(known, block_size) for _, known in growing)


def predicted_headroom_blocks(
    held: Iterable[Held], past: Sequence[int], block_size: int, *, least: int, num_blocks: int
) -> int:
    """What a pull leaves free by the peak, of `num_blocks` in all: with a reserve, and no less than
    it leaves without a prediction.
    """
    if len(past) < _ENOUGH:
        return least
    peak = peak_headroom_blocks(held, past, block_size)
    return max(least, peak) + int(_RESERVE * num_blocks)


def _to_go(one: Held, past: Sequence[int], share: float) -> int:
    """What is at `share` of those that went on for longer; as much again where none did."""
    begin = bisect_right(past, one.generated)
    longer = len(past) - begin
    to_go = past[begin + int(share * longer)] - one.generated if longer else one.generated
    return min(one.most, max(1, to_go))


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
