"""Which queued prompts leave a worker that has fallen behind, each for a candidate of its own.

DualMap's hotspot rebalancing (ICLR'26, arXiv 2602.06502): when the newest prompt of a queue would
break the TTFT target, the prompts that gain most move to the best other candidate they were given,
if they keep the target there, until the queue keeps it too. One pass, no cascade; nobody moves to a
worker that is not among its candidates, so caches stay useful.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from core.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A queued prompt: the seconds of work it is here, and would be at its other candidates."""

    work_s: float
    elsewhere_s: Mapping[WorkerId, float]
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveOne:
    """The prompt at `position` of the queue goes to `to`, whose TTFT is lower by `gain_s`."""

    position: int
    to: WorkerId
    gain_s: float


def choose_moves(
    queue: Sequence[Waiting], running_s: float, queue_s: Mapping[WorkerId, float], ttft_s: float
) -> list[MoveOne]:
    """Moves out of one queue, in order of service; `running_s` is left of what runs before it.

    `queue_s` holds the seconds queued at each other candidate. Empty while the queue keeps
    `ttft_s`; positions are those of `queue`, each at most once.
    """
    total_s = running_s + sum(waiting.work_s for waiting in queue)
    target_s = ttft_s - (queue[-1].waited_s if queue else 0.0)
    if total_s <= target_s:
        return []
    there_s = dict(queue_s)
    moves: list[MoveOne] = []
    for move in sorted(_gains(queue, running_s, there_s, ttft_s), key=lambda m: -m.gain_s):
        if total_s <= target_s:
            break
        waiting = queue[move.position]
        work_s = waiting.elsewhere_s[move.to]
        if there_s[move.to] + work_s + waiting.waited_s > ttft_s:
            continue  # an earlier move has filled that place
        there_s[move.to] += work_s
        total_s -= waiting.work_s
        moves.append(move)
    return moves


def _gains(
    queue: Sequence[Waiting], running_s: float, there_s: Mapping[WorkerId, float], ttft_s: float
) -> list[MoveOne]:
    """The best move of each prompt that gains by one and would keep the target."""
    found: list[MoveOne] = []
    here_s = running_s
    for position, waiting in enumerate(queue):
        here_s += waiting.work_s
        others = waiting.elsewhere_s.items()
        to, seconds = min(
            ((worker, there_s[worker] + work_s) for worker, work_s in others),
            key=lambda other: other[1],
            default=(None, 0.0),
        )
        if to is not None and seconds < here_s and seconds + waiting.waited_s <= ttft_s:
            found.append(MoveOne(position=position, to=to, gain_s=here_s - seconds))
    return found
