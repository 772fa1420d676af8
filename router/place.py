"""From links to candidates to a placement: what flow.py asks before it submits."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from core.ids import BlockHash
from router.client import WorkerLink
from router.policies.base import (
    Decision,
    DecodeCandidate,
    DecodePolicy,
    PrefillCandidate,
    PrefillPolicy,
)
from router.view import WorkerView


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The link chosen, why, and the load the leg will be to it (tokens)."""

    link: WorkerLink
    decision: Decision
    load_tokens: int


def place_prefill(
    links: Sequence[WorkerLink],
    prompt_tokens: int,
    hashes: Sequence[BlockHash],
    policy: PrefillPolicy,
    random: Random,
) -> Placement:
    """`links` are routable and not empty."""
    candidates = [
        _prefill_candidate(link, view, hashes) for link in links if (view := link.routable)
    ]
    decision = policy.choose(prompt_tokens, candidates, random)
    chosen = next(c for c in candidates if c.worker_id == decision.worker_id)
    link = next(link for link in links if link.record.worker_id == decision.worker_id)
    return Placement(link=link, decision=decision, load_tokens=prompt_tokens - chosen.cached_tokens)


def place_decode(
    links: Sequence[WorkerLink], total_tokens: int, policy: DecodePolicy, random: Random
) -> Placement:
    """`links` are routable and not empty; `total_tokens` is context plus what may come."""
    candidates = [_decode_candidate(link, view) for link in links if (view := link.routable)]
    decision = policy.choose(total_tokens, candidates, random)
    link = next(link for link in links if link.record.worker_id == decision.worker_id)
    return Placement(link=link, decision=decision, load_tokens=total_tokens)


def _prefill_candidate(
    link: WorkerLink, view: WorkerView, hashes: Sequence[BlockHash]
) -> PrefillCandidate:
    reported = view.load.queued_tokens if view.load is not None else 0
    return PrefillCandidate(
        worker_id=link.record.worker_id,
        cached_tokens=view.cached_blocks(hashes) * view.hello.layout.block_size,
        queued_tokens=reported + view.unseen_tokens,
    )


def _decode_candidate(link: WorkerLink, view: WorkerView) -> DecodeCandidate:
    load = view.load
    free_blocks = load.free_blocks if load is not None else 0
    free_tokens = free_blocks * view.hello.layout.block_size - view.unseen_tokens
    return DecodeCandidate(
        worker_id=link.record.worker_id,
        sequences=(load.running + load.waiting if load is not None else 0) + view.unseen_submits,
        context_tokens=(load.context_tokens if load is not None else 0) + view.unseen_tokens,
        free_tokens=free_tokens,
    )
