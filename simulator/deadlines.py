"""A router's requests end when their time is up, whatever they wait for.

All have the same time, so they end in the order in which they came: an event is due for the oldest
alone, and of those that are answered sooner nearly none ever has one.
"""

from collections.abc import Callable, Mapping

from simulator.events import Events
from simulator.job import Job


class Deadlines:
    """Of `jobs`, in order of arrival; `expire` takes out one whose time is up."""

    def __init__(
        self,
        events: Events,
        jobs: Mapping[int, Job],
        timeout_s: float,
        expire: Callable[[Job], None],
    ) -> None:
        self._events = events
        self._jobs = jobs
        self._timeout_s = timeout_s
        self._expire = expire
        self._watching = False

    def look_later(self) -> None:
        """One has come."""
        if not self._watching and self._jobs:
            self._watching = True
            self._events.at(self._due_s(self._oldest()), Deadlines._look, self)

    def _look(self) -> None:
        self._watching = False
        while self._jobs and self._due_s(self._oldest()) <= self._events.now_s():
            self._expire(self._oldest())
        self.look_later()

    def _oldest(self) -> Job:
        return next(iter(self._jobs.values()))

    def _due_s(self, job: Job) -> float:
        return job.request.at_s + self._timeout_s
