"""From links to candidates to a placement: what flow.py asks before it submits."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from core.ids import BlockHash
from core.messages import PrefixSource
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
    """The link chosen, why, and the load the leg will be to it (tokens).

    `source` is another worker that holds more of the prompt than the chosen one.
    """

    link: WorkerLink
    decision: Decision
    load_tokens: int
    source: PrefixSource | None = None


def place_prefill(
    links: Sequence[WorkerLink],
    prompt_tokens: int,
    hashes: Sequence[BlockHash],
    policy: PrefillPolicy,
    random: Random,
    *,
    holders: Sequence[WorkerLink] = (),
) -> Placement:
    """`links` are routable and not empty; `holders` are those whose caches may be read."""
    candidates = [
        _prefill_candidate(link, view, hashes) for link in links if (view := link.routable)
    ]
    decision = policy.choose(prompt_tokens, candidates, random)
    chosen = next(c for c in candidates if c.worker_id == decision.worker_id)
    link = next(link for link in links if link.record.worker_id == decision.worker_id)
    return Placement(
        link=link,
        decision=decision,
        load_tokens=prompt_tokens - chosen.cached_tokens,
        source=find_source(link, prompt_tokens, hashes, holders),
    )


def find_source(
    chosen: WorkerLink,
    prompt_tokens: int,
    hashes: Sequence[BlockHash],
    holders: Sequence[WorkerLink],
) -> PrefixSource | None:
    """Who holds the longest prefix of the prompt, if it is longer than what `chosen` holds.

    Of equals the one with the fewest sequences. The last token of a prompt is always computed, so
    its block counts for nobody.
    """
    here = chosen.view
    if here is None:
        return None
    wanted = hashes[: (prompt_tokens - 1) // here.hello.layout.block_size]
    most = here.cached_blocks(wanted) + 1
    best: WorkerView | None = None
    for link in holders:
        view = link.view
        blocks = view.cached_blocks(wanted, at_least=most) if view is not None else 0
        if view is None or blocks < most:
            continue
        if best is None or blocks > most or _less_busy(view, best):
            best, most = view, blocks
    if best is None:
        return None
    return PrefixSource(
        worker_id=best.hello.worker_id,
        address=best.hello.peer_address,
        incarnation=best.hello.incarnation,
        num_blocks=most,
    )


def _less_busy(view: WorkerView, other: WorkerView) -> bool:
    mine, its = (view.sequences, view.hello.worker_id), (other.sequences, other.hello.worker_id)
    return mine < its


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
        sequences=view.sequences,
        context_tokens=(load.context_tokens if load is not None else 0) + view.unseen_tokens,
        free_tokens=free_tokens,
    )
