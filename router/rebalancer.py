"""Moves queued prompts from a prefill worker that has fallen behind to another of their candidates.

    a load report -> which prompts gain (policies/rebalance.py) -> Withdraw to the worker
    Withdrawn     -> the attempt ends, the next one begins at the other worker (flow.py)
    no answer     -> it has begun there, and goes on

The worker alone knows whether a prompt has begun, so it decides: nothing is computed twice. A
sequence moves once at most, and only to a candidate without a queue: near the knee a move to a busy
one computes again what is cached elsewhere (`baton bench routing`, `baton, moving`), so nothing can
move to and fro.
"""

import logging
from collections.abc import Sequence

from core.clock import Clock
from core.ids import WorkerId
from router.chooser import Chooser
from router.policies.rebalance import MoveOne, Waiting, choose_moves
from router.queued import QueuedPrompt
from router.watcher import FlowWatcher, Requeue

log = logging.getLogger(__name__)

_EVERY_S = 0.1
_LOOKED_AT = 64
"""The last ones of a queue: who comes last waits for all before it."""
_MOVES = 8
"""Of one worker's prompts in one pass."""


class Rebalancer:
    """One router's. `look` costs next to nothing while every queue keeps the target."""

    def __init__(
        self, chooser: Chooser, clock: Clock, watcher: FlowWatcher, *, ttft_s: float, enabled: bool
    ) -> None:
        self._chooser = chooser
        self._clock = clock
        self._watcher = watcher
        self._ttft_s = ttft_s
        self._enabled = enabled
        self._next_at_s = 0.0

    def look(self) -> None:
        """A worker has reported its load, or one came or went."""
        now_s = self._clock.now_s()
        if not self._enabled or now_s < self._next_at_s:
            return
        self._next_at_s = now_s + _EVERY_S
        filled: dict[WorkerId, float] = {}
        for worker_id, prompts in self._chooser.queued.by_worker():
            self._relieve(worker_id, prompts, now_s, filled)

    def _relieve(
        self,
        here: WorkerId,
        prompts: Sequence[QueuedPrompt],
        now_s: float,
        filled: dict[WorkerId, float],
    ) -> None:
        """Ask for the moves that pay, out of one queue. `filled`: the seconds of work that this
        look has already asked for at each other worker.
        """
        overdue_s = max(0.0, *(prompt.overdue_s(now_s) for prompt in prompts))
        queue_s = self._chooser.queue_s(here)
        if queue_s is None or queue_s + overdue_s + _waited_s(prompts, now_s) <= self._ttft_s:
            return
        others_s = max(0.0, queue_s - sum(prompt.work_s for prompt in prompts))
        movable = [prompt for prompt in prompts if prompt.move is not None][-_LOOKED_AT:]
        looked_at = set(movable)
        stay_s = sum(prompt.work_s for prompt in prompts if prompt not in looked_at)
        for prompt, move in self._moves(movable, others_s + stay_s + overdue_s, now_s, filled):
            if prompt.move is None:
                continue
            ask, prompt.move = prompt.move, None
            log.debug("requeue from=%s to=%s gain_s=%.3f", here, move.to, move.gain_s)
            self._watcher.requeued(Requeue.ASKED)
            ask(move.to)

    def _moves(
        self,
        prompts: Sequence[QueuedPrompt],
        before_s: float,
        now_s: float,
        filled: dict[WorkerId, float],
    ) -> list[tuple[QueuedPrompt, MoveOne]]:
        """`before_s`: what the first of them waits for."""
        idle: dict[WorkerId, float] = {}
        queue: list[Waiting] = []
        for prompt in prompts:
            elsewhere_s = self._chooser.idle_work_s(prompt)
            idle.update((worker, filled.get(worker, 0.0)) for worker in elsewhere_s)
            queue.append(
                Waiting(
                    work_s=prompt.work_s,
                    elsewhere_s=elsewhere_s,
                    waited_s=now_s - prompt.arrived_at_s,
                )
            )
        moves = choose_moves(queue, before_s, idle, self._ttft_s)[:_MOVES]
        for move in moves:
            work_s = queue[move.position].elsewhere_s[move.to]
            filled[move.to] = filled.get(move.to, 0.0) + work_s
        return [(prompts[move.position], move) for move in moves]


def _waited_s(prompts: Sequence[QueuedPrompt], now_s: float) -> float:
    """Of the one that has waited least, the last of the queue."""
    return min(now_s - prompt.arrived_at_s for prompt in prompts)
