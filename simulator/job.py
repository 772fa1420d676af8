"""One request on its way through the simulated cluster: its legs, and what became of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import TYPE_CHECKING

from core.ids import BlockHash, Incarnation
from core.messages import PrefixSource
from router.queued import QueuedPrompt
from router.tries import Tries
from simulator.fleet import Member, SimLink
from simulator.handoff import Handoff
from simulator.migration import AnswerMove
from simulator.prefix import Fetch
from simulator.sequence import SimSequence
from simulator.workload.types import SimRequest

if TYPE_CHECKING:
    from simulator.router import SimRouter


@dataclass(slots=True)
class Record:
    """What became of a request. Times are nan where it did not get so far."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0
    first_s: float = nan
    end_s: float = nan
    transfer_s: float = 0.0
    """From the first token to the KV being usable where the answer goes on."""
    evictions: int = 0
    """Times it gave its blocks back for others to grow."""
    moves: int = 0
    """Times it went on at another decode worker."""
    pause_s: float = 0.0
    """The longest that it stood still for one."""
    attempts: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    outcome: str = "unfinished"
    retry_after_s: float | None = None
    """What it was told when it was refused."""
    is_asked_again: bool = False
    """Then another record tells of the next time."""
    session: str = ""

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.at_s

    @property
    def tpot_s(self) -> float:
        """Mean time between its tokens; 0 of a single one."""
        gaps = self.output_tokens - 1
        return (self.end_s - self.first_s) / gaps if gaps > 0 else self.end_s - self.first_s


class Job:
    """A request at its router. `emitted` tokens have reached the client, `emitted_before` of them
    before its latest attempt.
    """

    __slots__ = (
        "began_s",
        "decode",
        "emitted",
        "emitted_before",
        "failed",
        "legs",
        "move",
        "noes",
        "queued",
        "record",
        "refused",
        "request",
        "requeued",
        "router",
        "tries",
    )

    def __init__(self, request: SimRequest, router: "SimRouter", max_attempts: int) -> None:
        self.request = request
        self.router = router
        self.record = Record(
            request.at_s,
            request.prompt_tokens,
            request.output_tokens,
            session=request.session,
        )
        self.emitted = self.emitted_before = 0
        self.tries = Tries(max_attempts)
        self.failed: set[Incarnation] = set()
        self.refused: set[Incarnation] = set()
        """Prefill workers that were full, since one took it or all of them were."""
        self.noes = 0
        """Of these, in a row since it last stood in line."""
        self.legs: list[Leg] = []
        self.move: AnswerMove | None = None
        """While it is on its way from one decode worker to another."""
        self.decode: SimLink | None = None
        self.queued: QueuedPrompt | None = None
        self.requeued = False
        """It has moved out of a queue once, and does not again."""
        self.began_s = nan

    @property
    def context_tokens(self) -> int:
        return self.request.prompt_tokens + self.emitted

    @property
    def outputs_left(self) -> int:
        return self.request.output_tokens - self.emitted

    def has_leg_on(self, member: Member) -> bool:
        return any(leg.link.member is member for leg in self.legs)

    def generating(self) -> "list[Leg]":
        """The leg that gives the answer's tokens, once it does."""
        return [leg for leg in self.legs if not isinstance(leg, PrefillLeg)]

    def hashes(self, block_size: int) -> Sequence[BlockHash]:
        """Of the prompt's full blocks."""
        return self.request.hashes[: self.request.prompt_tokens // block_size]


class Leg:
    """A part of an attempt on one worker. `over`: nothing it hears counts any more."""

    __slots__ = ("handoff", "job", "link", "over", "sequence")

    def __init__(self, job: Job, link: SimLink, outputs_left: int, now_s: float) -> None:
        self.job = job
        self.link = link
        self.over = False
        self.handoff: Handoff | None = None
        size = link.member.worker.spec.block_size
        self.sequence = SimSequence(
            self,
            context_tokens=job.context_tokens,
            outputs_left=outputs_left,
            hashes=job.hashes(size),
            most_tokens=job.router.max_tokens(job) - job.emitted,
            emitted=job.emitted,
            arrived_at_s=now_s,
        )
        self.sequence.on_preempted = self.evicted

    def evicted(self) -> None:
        """Its context is to be computed again."""
        self.job.record.evictions += 1

    def computed(self, sequence: SimSequence) -> None:
        pass

    def first_token(self, sequence: SimSequence) -> bool:
        return True

    def ended(self, sequence: SimSequence) -> None:
        if not self.over:
            self.job.router.finished(self.job)

    def drop(self) -> None:
        """End what it does; its worker may be dead."""
        if self.over:
            return
        self.over = True
        if self.handoff is not None:
            self.handoff.abort()
        if self.job.move is not None:
            self.job.move.drop("the leg was cancelled")
        self.link.member.worker.cancel(self.sequence)


class PrefillLeg(Leg):
    """Computes the prompt and gives its KV away; ends with the first token."""

    __slots__ = ("fetch",)

    def __init__(self, job: Job, link: SimLink, now_s: float) -> None:
        super().__init__(job, link, 1, now_s)
        self.fetch: Fetch | None = None

    def compute(self, source: PrefixSource | None, owner: Member | None, deadline_s: float) -> None:
        """Now, or when what pays off of its prefix has been fetched."""
        member = self.link.member
        fetcher, worker = member.fetcher, member.worker
        if fetcher is not None and source is not None and owner is not None:
            self.fetch = fetcher.bring(self.sequence, source, owner, deadline_s, self._fetched)
        if self.fetch is None:
            worker.compute(self.sequence)
        else:
            worker.fetching(1, self.fetch.left_tokens)

    def _fetched(self, fetch: Fetch) -> None:
        """It has what it will get."""
        self.fetch = None
        self.link.member.worker.fetching(-1, -fetch.left_tokens)
        self.link.member.worker.compute(self.sequence)

    def drop(self) -> None:
        fetch, self.fetch = self.fetch, None
        if fetch is not None:
            self.link.member.worker.fetching(-1, -fetch.left_tokens)
            fetch.cancel()
        super().drop()

    def computed(self, sequence: SimSequence) -> None:
        if self.handoff is None:
            return
        size = self.link.member.worker.spec.block_size
        whole = sequence.computed >= sequence.context_tokens
        full = sequence.computed // size * size
        self.handoff.announce(sequence.context_tokens if whole else full)

    def first_token(self, sequence: SimSequence) -> bool:
        if not self.over:
            ended = self.job.outputs_left == 1
            if self.handoff is not None:
                self.handoff.lease(sequence.blocks, ended=ended)
            self.job.router.prefilled(self, ended=ended)
        return False


class ComputeLeg(Leg):
    """Computes the prompt where the answer goes on."""

    def __init__(self, job: Job, link: SimLink, now_s: float) -> None:
        super().__init__(job, link, job.outputs_left, now_s)

    def first_token(self, sequence: SimSequence) -> bool:
        if not self.over:
            self.job.router.prefilled(self, ended=False)
        return True


class DecodeLeg(Leg):
    """Generates from KV that comes from elsewhere."""

    def __init__(self, job: Job, link: SimLink, now_s: float) -> None:
        super().__init__(job, link, job.outputs_left, now_s)
