"""What goes into the next step: decodes first, the rest of the budget to prefill chunks.

Pure. One token of every decoding sequence, then chunks of the others in the given order. A prompt
gets at most `chunk_tokens` of a step, so a long one delays running answers little; how much beside
them, core.step.StepBudget tells. What is left up to `step_tokens` goes to prompts that end with it:
each step reads the weights, and short prompts share that. Long ones would save as much by longer
chunks, and hold up whoever is behind and beside them.
"""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat

_LEAST_SHARE = 8
"""However many decode, where the step has room a long prompt gets an eighth of a chunk."""


def plan_step(
    pending: Sequence[int], step_tokens: int, max_batch: int, chunk_tokens: int | None = None
) -> list[int]:
    """Tokens to feed now, per sequence, given the tokens each has not computed yet (>= 1).

    One place, and at least one token, is kept for a prefill however many decode: a preempted
    sequence that recomputes its KV holds blocks and must get on.

    A sequence with one pending token decodes (or finishes a prefill, the same work). When there are
    more decodes than `max_batch` the first ones go; callers rotate the order for fairness.
    """
    prompts = [tokens for tokens in pending if tokens > 1]
    decodes, chunks = share_step(
        len(pending) - len(prompts), prompts, step_tokens, max_batch, chunk_tokens
    )
    chunk, decode = chain(chunks, repeat(0)), chain(repeat(1, decodes), repeat(0))
    return [next(chunk if tokens > 1 else decode) for tokens in pending]


def share_step(
    decodes: int,
    prompts: Iterable[int],
    step_tokens: int,
    max_batch: int,
    chunk_tokens: int | None = None,
) -> tuple[int, list[int]]:
    """How many of the sequences with one pending token go, and what the first of the others are
    fed; those behind get nothing, and are not looked at.

    `plan_step` for those who need not know who decodes, only how many do. Unset, and at most,
    `chunk_tokens` is `step_tokens`.
    """
    chunk_tokens = min(chunk_tokens or step_tokens, step_tokens)
    coming = iter(prompts)
    tokens = next(coming, None)
    kept = 1 if max_batch > 1 and tokens is not None else 0
    fed = min(decodes, max_batch - kept)
    left, whole = max_batch - fed, step_tokens - fed
    room = max(chunk_tokens - fed, min(chunk_tokens // _LEAST_SHARE, whole))
    chunks: list[int] = []
    while tokens is not None and left > 0:
        if tokens <= min(chunk_tokens, whole):
            count = tokens
        elif room > 0 or kept:
            count = min(tokens, max(room, 1))
        else:
            break  # nobody overtakes
        chunks.append(count)
        left, room, whole, kept = left - 1, room - count, whole - count, 0
        tokens = next(coming, None)
    return fed, chunks
