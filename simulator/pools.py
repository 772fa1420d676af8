"""The places of a simulated cluster's workers, and what is seen of them from time to time."""

from dataclasses import dataclass, field

from simulator.fleet import Member
from simulator.links import Port
from simulator.spec import PoolSpec


@dataclass(frozen=True, slots=True)
class Sample:
    """One pool at one moment. Shares are 0 to 1."""

    at_s: float
    workers: int
    queued_tokens: int
    running: int
    kv_share: float
    busy_share: float
    """Of the time since the last sample."""
    fragmented_share: float = 0.0
    """Of the KV memory, what is free on some workers while hand-offs that would fit into it wait
    for room on others (Llumnix, OSDI'24, section 3).
    """


@dataclass(slots=True)
class Slot:
    """A place for a worker: its lives follow one another. A member may be dead for a while before
    anybody notices.
    """

    pool: PoolSpec
    name: str
    domain: int
    port: Port
    life: int = 0
    member: Member | None = None
    busy_s: float = 0.0
    """Of earlier lives."""
    preemptions: int = 0

    @property
    def living(self) -> Member | None:
        """Whoever works there now."""
        member = self.member
        return None if member is None or member.is_dead else member

    def die(self) -> Member | None:
        """Its life ends; answers it, if there was one."""
        member = self.living
        if member is not None:
            self.busy_s += member.worker.busy_s
            self.preemptions += member.worker.scheduler.preemptions
            member.is_dead = True
            member.worker.die()
        return member


@dataclass(slots=True)
class Pool:
    """All slots of one kind."""

    spec: PoolSpec
    slots: list[Slot]
    samples: list[Sample] = field(default_factory=list)
    _seen_busy_s: float = 0.0

    def living(self) -> list[Member]:
        """Those that work now."""
        return [member for slot in self.slots if (member := slot.living) is not None]

    @property
    def busy_s(self) -> float:
        """Seconds of steps of all lives so far."""
        lives = sum(member.worker.busy_s for member in self.living())
        return lives + sum(slot.busy_s for slot in self.slots)

    @property
    def preemptions(self) -> int:
        """Of all lives so far."""
        lives = sum(member.worker.scheduler.preemptions for member in self.living())
        return lives + sum(slot.preemptions for slot in self.slots)

    def sample(self, now_s: float, since_s: float) -> None:
        """Look at it, `since_s` after the last time."""
        loads = [member.worker.load() for member in self.living()]
        free = sum(load.free_blocks for load in loads)
        blocks = sum(load.total_blocks for load in loads)
        busy_s, before_s = self.busy_s, self._seen_busy_s
        self._seen_busy_s = busy_s
        self.samples.append(
            Sample(
                at_s=now_s,
                workers=len(loads),
                queued_tokens=sum(load.queued_tokens for load in loads),
                running=sum(load.running for load in loads),
                kv_share=1 - free / blocks if blocks else 0.0,
                busy_share=(busy_s - before_s) / since_s / max(1, len(self.slots)),
                fragmented_share=self._fragmented() / blocks if blocks else 0.0,
            )
        )

    def _fragmented(self) -> int:
        """Free blocks that the first pulls in line would need, as many of them as all would fit."""
        members, wanted, size = self.living(), 0, self.spec.worker.block_size
        left = sum(member.worker.pool.available for member in members)
        for tokens in sorted(filter(None, (member.queue.wanted_tokens for member in members))):
            blocks = -(-tokens // size)
            if wanted + blocks > left:
                break
            wanted += blocks
        return wanted
