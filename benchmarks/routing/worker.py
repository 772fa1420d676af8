"""A prefill worker under the replay's clock: first come, first served, one prompt at a time, with a
bounded cache that forgets what was used longest ago, the tail of a prompt before its head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.routing.lru import Lru
from benchmarks.routing.traces import Prompt
from core.ids import BlockHash, WorkerId
from core.messages import KvEvents, KvRemoved, KvStored
from router.curves import PrefillCurve


@dataclass(slots=True)
class Job:
    """A prompt placed on a worker. `uncached` is what the worker would report as queued for it."""

    prompt: Prompt
    at_s: float
    candidates: Sequence[WorkerId]
    uncached: int = 0
    work_s: float = 0.0
    """As the router expected where it was placed, before it was."""
    started_s: float = 0.0
    ends_s: float = 0.0
    hit_tokens: int = 0


class Worker:
    """`submit` and `take` when the clock says so, `finish` when the running job's end has come."""

    def __init__(self, block_size: int, cache_tokens: int, curve: PrefillCurve) -> None:
        self._block_size = block_size
        self._curve = curve
        self._cache = Lru(cache_tokens // block_size)
        self._next_event = 1
        self.queue: list[Job] = []
        self.running: Job | None = None
        self.work_s = 0.0
        """Seconds of prefill begun so far."""

    def submit(self, job: Job, now_s: float) -> bool:
        """Queue the job, or begin it at once; whether it has begun."""
        job.uncached = job.prompt.tokens - self._hit(job.prompt)
        self.queue.append(job)
        return self.begin(now_s)

    def begin(self, now_s: float) -> bool:
        """Begin the first of the queue if nothing runs; whether one has begun."""
        if self.running is not None or not self.queue:
            return False
        job = self.running = self.queue.pop(0)
        job.hit_tokens = self._hit(job.prompt)
        job.uncached = job.prompt.tokens - job.hit_tokens
        seconds = self._curve.seconds(job.hit_tokens, job.prompt.tokens)
        job.started_s, job.ends_s = now_s, now_s + seconds
        self.work_s += seconds
        return True

    def finish(self) -> tuple[Job, KvEvents]:
        """The running job has ended: its blocks are cached."""
        job, self.running = self.running, None
        assert job is not None
        hashes = job.prompt.hashes
        stored, removed = self._cache.add(hashes)
        events = KvEvents(
            first_number=self._next_event,
            events=(
                KvStored(parent=hashes[0] if hashes else BlockHash(b""), hashes=stored),
                KvRemoved(hashes=removed),
            ),
        )
        self._next_event += 2
        return job, events

    def queued_tokens(self, now_s: float) -> int:
        """Uncached tokens not yet prefilled, of the running prompt what is left of it."""
        tokens = sum(job.uncached for job in self.queue)
        if self.running is not None:
            tokens += round(self.running.uncached * self._left(now_s))
        return tokens

    def running_s(self, now_s: float) -> float:
        """Seconds until the running job ends."""
        return max(0.0, self.running.ends_s - now_s) if self.running is not None else 0.0

    def _left(self, now_s: float) -> float:
        job = self.running
        if job is None or job.ends_s <= job.started_s:
            return 0.0
        return max(0.0, job.ends_s - now_s) / (job.ends_s - job.started_s)

    def _hit(self, prompt: Prompt) -> int:
        held = self._cache.held(prompt.hashes)
        return min(held * self._block_size, prompt.tokens - 1)
