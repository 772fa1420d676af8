"""Queued prompts that move: when the live rebalancer looks, under the virtual clock."""

from router.chooser import Chooser
from router.rebalancer import EVERY_S, Rebalancer
from router.watcher import Requeue, Unwatched
from simulator.events import Events
from simulator.fleet import SimLink
from simulator.spec import SimSpec


class Moves(Unwatched):
    """One router's. It looks as often as the rebalancer does while prompts are on their way; the
    live one with each load report, which busy workers make all the time.
    """

    def __init__(self, spec: SimSpec, chooser: Chooser[SimLink], events: Events) -> None:
        self._enabled = spec.router.requeue
        self._queued = chooser.queued
        self._events = events
        self._rebalancer = Rebalancer(
            chooser, events, self, ttft_s=spec.slo.ttft_s, enabled=self._enabled
        )
        self._watching = False
        self.moved = 0

    def look_later(self) -> None:
        """A prompt is on its way that may move."""
        if not self._watching and self._enabled:
            self._watching = True
            self._events.at(self._events.now_s() + EVERY_S, Moves._look, self)

    def requeued(self, step: Requeue) -> None:
        self.moved += step is Requeue.MOVED

    def _look(self) -> None:
        self._watching = False
        self._rebalancer.look()
        if self._queued:
            self.look_later()
