"""Which running answer moves to which decode worker, so that memory lies where it is waited for.

A decode worker's freeness is the steps it can still make with the memory it has,

    F = (memory - all contexts there, those that wait for memory included) / answers that run

below 0 where somebody waits in vain: whoever waits makes a worker look full that is only
fragmented, which is what moves the others away (Llumnix, OSDI'24, section 4.4: virtual usage; there
the head of a queue counts, here all of it, as reports tell no more). Of those below `_LOW` the one
with the least gives to the one with the most, if that is above `_HIGH`; the shortest answer moves
that leaves the giver the less free of the two.
"""

from collections.abc import Sequence
from typing import NamedTuple

from core.ids import WorkerId

_LOW = 30.0
_HIGH = 100.0


class DecodeRoom(NamedTuple):
    """A decode worker, as it reports itself; tokens."""

    worker_id: WorkerId
    room_tokens: int
    context_tokens: int
    """Of all there, also of those on their way or waiting."""
    running: int

    @property
    def freeness(self) -> float:
        return (self.room_tokens - self.context_tokens) / max(1, self.running)

    def without(self, tokens: int) -> "DecodeRoom":
        """After an answer of so many has left; below 0: has come."""
        more = 1 if tokens > 0 else -1
        return self._replace(
            context_tokens=self.context_tokens - tokens, running=self.running - more
        )


def pair_rooms(rooms: Sequence[DecodeRoom]) -> list[tuple[DecodeRoom, DecodeRoom]]:
    """Givers and takers, each once: the least free gives to the freest."""
    ordered = sorted(rooms, key=lambda room: room.freeness)
    pairs = []
    for i, giver in enumerate(ordered[: len(ordered) // 2]):
        taker = ordered[-1 - i]
        if giver.freeness >= _LOW or taker.freeness <= _HIGH:
            break
        pairs.append((giver, taker))
    return pairs


def pick_answer(giver: DecodeRoom, taker: DecodeRoom, contexts: Sequence[int]) -> int | None:
    """The position of the answer that moves, of those that run at the giver; None: none gains."""
    for tokens, position in sorted((tokens, i) for i, tokens in enumerate(contexts)):
        if giver.without(tokens).freeness < taker.without(-tokens).freeness:
            return position
    return None
