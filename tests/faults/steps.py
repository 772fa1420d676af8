"""An engine that stands still inside a step when told to."""

import logging
from collections.abc import Sequence

from core.errors import BatonError
from engine.arena import Arena
from engine.types import Engine, EngineInfo, Sampled, SeqStep
from tests.faults.board import Board
from tests.faults.fault import Fault

log = logging.getLogger(__name__)


class FaultyEngine:
    """Implements engine.types.Engine around another one."""

    def __init__(self, inner: Engine, board: Board) -> None:
        self._inner = inner
        self._board = board

    @property
    def info(self) -> EngineInfo:
        return self._inner.info

    @property
    def arena(self) -> Arena:
        return self._inner.arena

    def step(self, batch: Sequence[SeqStep]) -> list[Sampled | BatonError | None]:
        self._board.hold_thread(Fault.IN_STEP)  # before the KV is written: it may be late
        return self._inner.step(batch)

    def close(self) -> None:
        self._inner.close()
        log.info("engine_closed")
