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
from bisect import bisect_left
from collections.abc import Sequence
from typing import Generic

from core.clock import Clock
from core.ids import WorkerId
from router.chooser import Chooser
from router.members import L
from router.policies.rebalance import MoveOne, Waiting, choose_moves
from router.queued import QueuedPrompt
from router.watcher import FlowWatcher, Requeue

log = logging.getLogger(__name__)

EVERY_S = 0.1
"""Looks are so far apart at least."""
_PER_PASS = 128
"""Prompts, and queues, looked at in one pass, whatever waits: it holds up the event loop. The next
pass goes on where it stopped.
"""
_PER_QUEUE = 64
"""Of these, prompts of one queue, the last ones first: who comes last waits for all before it."""
_MOVES = 8
"""Of one worker's prompts in one pass."""


class Rebalancer(Generic[L]):
    """One router's. `look` costs next to nothing while every queue keeps the target."""

    def __init__(
        self,
        chooser: Chooser[L],
        clock: Clock,
        watcher: FlowWatcher,
        *,
        ttft_s: float,
        enabled: bool,
    ) -> None:
        self._chooser = chooser
        self._clock = clock
        self._watcher = watcher
        self._ttft_s = ttft_s
        self._enabled = enabled
        self._next_at_s = 0.0
        self._next_worker = WorkerId("")
        """Whose queue, or the next one's in order of id, the next pass begins with."""
        self._depths: dict[WorkerId, int] = {}
        """How many prompts from the end of a queue the next look at it leaves out."""

    def look(self) -> None:
        """A worker has reported its load, or one came or went."""
        now_s = self._clock.now_s()
        if not self._enabled or now_s < self._next_at_s:
            return
        self._next_at_s = now_s + EVERY_S
        workers = sorted(self._chooser.queued.workers())
        self._depths = {w: self._depths[w] for w in workers if w in self._depths}
        first = bisect_left(workers, self._next_worker)
        filled: dict[WorkerId, float] = {}
        left = _PER_PASS
        for worker_id in (*workers[first:], *workers[:first]):
            if left <= 0:
                self._next_worker = worker_id
                return
            prompts = self._chooser.queued.at(worker_id)
            if prompts:
                left -= self._relieve(worker_id, prompts, left, now_s, filled)

    def _relieve(
        self,
        here: WorkerId,
        prompts: Sequence[QueuedPrompt],
        limit: int,
        now_s: float,
        filled: dict[WorkerId, float],
    ) -> int:
        """Ask for the moves that pay, out of one queue; answers what that took of the `limit`.

        `filled`: the seconds of work that this pass has already asked for at each other worker.
        """
        overdue_s = max(0.0, *(prompt.overdue_s(now_s) for prompt in prompts[:_PER_QUEUE]))
        queue_s = self._chooser.queue_s(here)
        waited_s = _waited_s(prompts[-_PER_QUEUE:], now_s)
        if queue_s is None or queue_s + overdue_s + waited_s <= self._ttft_s:
            self._depths.pop(here, None)
            return 1
        others_s = max(0.0, queue_s - _work_s(prompts))
        start, end = self._turn(here, len(prompts), min(limit, _PER_QUEUE))
        before_s = others_s + overdue_s + _work_s(prompts[:start])
        queue = [self._waiting(prompt, now_s) for prompt in prompts[start:end]]
        if behind := prompts[end:]:
            queue.append(
                Waiting(work_s=_work_s(behind), elsewhere_s={}, waited_s=_waited_s(behind, now_s))
            )
        for move in self._moves(queue, before_s, filled):
            prompt = prompts[start + move.position]
            if prompt.move is None:
                continue
            ask, prompt.move = prompt.move, None
            log.debug("requeue from=%s to=%s gain_s=%.3f", here, move.to, move.gain_s)
            self._watcher.requeued(Requeue.ASKED)
            ask(move.to)
        return end - start

    def _turn(self, here: WorkerId, length: int, limit: int) -> tuple[int, int]:
        """Which part of a queue is looked at now: [start, end), where the last look began."""
        depth = self._depths.get(here, 0)
        end = length - depth if depth < length else length
        start = max(0, end - limit)
        self._depths[here] = length - start if start else 0
        return start, end

    def _waiting(self, prompt: QueuedPrompt, now_s: float) -> Waiting:
        return Waiting(
            work_s=prompt.work_s,
            elsewhere_s={} if prompt.move is None else self._chooser.idle_work_s(prompt),
            waited_s=now_s - prompt.arrived_at_s,
        )

    def _moves(
        self, queue: Sequence[Waiting], before_s: float, filled: dict[WorkerId, float]
    ) -> list[MoveOne]:
        """`before_s`: what the first of them waits for."""
        others = {worker for waiting in queue for worker in waiting.elsewhere_s}
        idle = {worker: filled.get(worker, 0.0) for worker in others}
        moves = choose_moves(queue, before_s, idle, self._ttft_s)[:_MOVES]
        for move in moves:
            work_s = queue[move.position].elsewhere_s[move.to]
            filled[move.to] = filled.get(move.to, 0.0) + work_s
        return moves


def _waited_s(prompts: Sequence[QueuedPrompt], now_s: float) -> float:
    """Of the one that has waited least, the last of the queue."""
    return min(now_s - prompt.arrived_at_s for prompt in prompts)


def _work_s(prompts: Sequence[QueuedPrompt]) -> float:
    return sum(prompt.work_s for prompt in prompts)
