"""Running answers that move to where there is memory: router.freeness, asked again and again."""

from collections.abc import Callable, Sequence

from core.ids import Role, WorkerId
from router.freeness import DecodeRoom, pair_rooms, pick_answer
from simulator.events import Events
from simulator.fleet import SimFleet
from simulator.job import Job, Leg

_EVERY_S = 0.1


class Balance:
    """One router's. `running` are its answers at a decode worker; `move` begins a move."""

    def __init__(
        self,
        fleet: SimFleet,
        events: Events,
        *,
        running: Callable[[WorkerId], Sequence[Leg]],
        move: Callable[[Job, WorkerId], None],
    ) -> None:
        self._fleet = fleet
        self._events = events
        self._running = running
        self._move = move
        self._watching = False

    def look_later(self) -> None:
        """An answer runs."""
        if not self._watching:
            self._watching = True
            self._events.at(self._events.now_s() + _EVERY_S, Balance._look, self)

    def _look(self) -> None:
        self._watching = False
        for giver, taker in pair_rooms(self._rooms()):
            legs = self._running(giver.worker_id)
            if any(leg.job.move is not None for leg in legs):
                continue
            worker = self._fleet.link(Role.DECODE, giver.worker_id).member.worker
            chosen = pick_answer(giver, taker, [worker.known_now(leg.sequence) for leg in legs])
            if chosen is not None:
                self._move(legs[chosen].job, taker.worker_id)
        if any(self._running(worker) for worker in self._fleet.pool(Role.DECODE).workers):
            self.look_later()

    def _rooms(self) -> list[DecodeRoom]:
        views = self._fleet.pool(Role.DECODE).views
        return [
            DecodeRoom(
                worker_id=worker,
                room_tokens=view.hello.num_blocks * view.hello.layout.block_size,
                context_tokens=load.context_tokens,
                running=load.running,
            )
            for worker, view in views.items()
            if (load := view.load) is not None
        ]
