"""How often each worker of a run died, and how the last time: the controller writes it to the run's
folder for `baton status`.
"""

import json
import logging
from dataclasses import asdict, dataclass

from cluster.events import WorkerDied
from cluster.run_dir import RunDir
from core.clock import Clock

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deaths:
    """Of one worker, which had served each time."""

    count: int
    last_pid: int
    last_reason: str
    last_s: float
    """Wall time, seconds since the epoch."""


class DeathBook:
    """Kept by the controller."""

    def __init__(self, run: RunDir, clock: Clock) -> None:
        self._run = run
        self._clock = clock
        self._deaths: dict[str, Deaths] = {}

    def note(self, died: WorkerDied) -> None:
        """Count it and write it down; a disk that is full is only logged."""
        before = self._deaths.get(died.worker_id)
        self._deaths[died.worker_id] = Deaths(
            count=1 + (before.count if before is not None else 0),
            last_pid=died.pid,
            last_reason=died.reason,
            last_s=self._clock.wall_s(),
        )
        try:
            self._run.write_deaths(
                json.dumps({worker: asdict(deaths) for worker, deaths in self._deaths.items()})
            )
        except OSError as error:
            log.warning("deaths_not_written reason=%s", error)


def read_deaths(run: RunDir) -> dict[str, Deaths]:
    """By worker_id; those that never died are not in it. Raises ValueError for another's file."""
    try:
        written = json.loads(run.deaths.read_text())
        return {str(worker): Deaths(**fields) for worker, fields in written.items()}
    except FileNotFoundError:
        return {}
    except TypeError as error:
        raise ValueError(f"{run.deaths} is of another version") from error
