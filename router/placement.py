"""What a choice of workers is: where a leg goes, why, and what was weighed for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, NamedTuple

from core.ids import WorkerId
from core.messages import PrefixSource
from router.local import LocalVerdict
from router.members import L
from router.place import PrefillPoolQuery
from router.policies.base import Decision
from router.queued import QueuedPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement(Generic[L]):
    """The link chosen, why, and the load the leg will be to it: tokens whose KV it will hold, and
    of these those that it will compute.

    `source` is another worker that holds more of the prompt than the chosen one.
    """

    link: L
    decision: Decision
    load_tokens: int
    prompt_tokens: int = 0
    source: PrefixSource | None = None
    queued: QueuedPrompt | None = None
    """For whoever submits the prompt to note in `Chooser.queued`, and to discard."""


class Outlook(NamedTuple):
    """Seconds at one candidate: of what is before the prompt, and of its own uncached tokens."""

    queue_s: float
    work_s: float


class Local(NamedTuple, Generic[L]):
    """Whether one worker serves the prompt alone; then also which, what awaits the prompt there,
    and how many decode workers such prompts may go to.
    """

    verdict: LocalVerdict
    placement: Placement[L] | None = None
    outlook: Outlook = Outlook(0.0, 0.0)
    workers: int = 0


class Explained(NamedTuple):
    """Both legs of a prompt, which are one where `local` says LOCAL or STAYS."""

    prefill: Decision
    decode: Decision
    local: LocalVerdict


class Considered(NamedTuple, Generic[L]):
    """A prefill worker chosen for a prompt, which was not submitted there yet. With a placement in
    `local` one worker serves it alone: a decode worker, or this one.
    """

    query: PrefillPoolQuery
    decision: Decision
    local: Local[L] = Local(LocalVerdict.OFF)

    @property
    def is_alone(self) -> bool:
        """One worker computes the prompt and its answer."""
        return self.local.placement is not None or self.query.is_colocated(self.decision.worker_id)

    @property
    def places(self) -> int:
        """Workers that prompts like it are computed on."""
        return len(self.query.pool) + self.local.workers

    @property
    def worker_id(self) -> WorkerId:
        """Where it would be computed."""
        placement = self.local.placement
        return (self.decision if placement is None else placement.decision).worker_id

    def outlooks(self) -> Iterator[tuple[WorkerId, Outlook]]:
        """At the worker that serves it alone, if one does; at the chosen worker, then at the other
        candidates; of those only that are of a kind whose prefills were measured.
        """
        local, alone = self.local.placement, self.worker_id
        if local is not None:
            yield alone, self.local.outlook
        query, chosen = self.query, self.decision.worker_id
        others = (c.worker_id for c in self.decision.candidates if c.worker_id != chosen)
        for worker in chain((chosen,), others):
            if query.measured(worker) and (local is None or worker != alone):
                yield worker, Outlook(*query.expected_s(worker))
