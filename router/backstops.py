"""Two timers of an attempt: for a worker's answer to a submit, and for a lease nobody reads yet."""

import asyncio
from collections.abc import Callable

from core.ids import LeaseId
from core.messages import RenewLeases
from router.client import Leg

_SECOND_LOOK_S = 0.05


class Answers:
    """Waits for yes or no to each submit. A worker gives one at once, or does not hear us, whatever
    else it may say.
    """

    __slots__ = ("_answer_s", "_waiting")

    def __init__(self, answer_s: float) -> None:
        self._answer_s = answer_s
        self._waiting: dict[Leg, asyncio.TimerHandle] = {}

    def expect(self, leg: Leg, give_up: Callable[[Leg], None]) -> None:
        """It was submitted now; without an answer in time `give_up` is told. Only the timer keeps
        that: an attempt is to be gone when it has ended, without the garbage collector.
        """
        loop = asyncio.get_running_loop()
        self._waiting[leg] = loop.call_later(self._answer_s, self._look_again, leg, give_up)

    def came(self, leg: Leg) -> None:
        """Its worker has answered."""
        timer = self._waiting.pop(leg, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        """Wait for none any more."""
        for leg in list(self._waiting):
            self.came(leg)

    def _look_again(self, leg: Leg, give_up: Callable[[Leg], None]) -> None:
        """After a pause of this process the timer may come before an answer that waits unread."""
        loop = asyncio.get_running_loop()
        self._waiting[leg] = loop.call_later(_SECOND_LOOK_S, give_up, leg)


class Renewal:
    """Renews a prefill's lease while no reader is bound to it: from `start` to `stop`."""

    __slots__ = ("_timer",)

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def start(self, prefill: Leg, lease_id: LeaseId, lease_s: float) -> None:
        """In thirds of the lease; one of no length is not renewed."""
        self.stop()
        if lease_s > 0:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(lease_s / 3, self._renew, prefill, lease_id, lease_s)

    def stop(self) -> None:
        """May repeat."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _renew(self, prefill: Leg, lease_id: LeaseId, lease_s: float) -> None:
        prefill.link.send(RenewLeases(lease_ids=(lease_id,)))
        self.start(prefill, lease_id, lease_s)
