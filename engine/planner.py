"""What goes into the next step: decodes first, the rest of the budget to prefill chunks.

Pure. One token of every decoding sequence, then chunks of the others in the given order, so a long
prompt delays running answers by at most one step of `step_tokens`.
"""

from collections.abc import Sequence


def plan_step(pending: Sequence[int], step_tokens: int, max_batch: int) -> list[int]:
    """Tokens to feed now, per sequence, given the tokens each has not computed yet (>= 1).

    One place, and at least one token, is kept for a prefill however many decode: a preempted
    sequence that recomputes its KV holds blocks and must get on.

    A sequence with one pending token decodes (or finishes a prefill, the same work). When there are
    more decodes than `max_batch` the first ones go; callers rotate the order for fairness.
    """
    feed = [0] * len(pending)
    left = max_batch
    budget = step_tokens
    kept = 1 if max_batch > 1 and any(tokens > 1 for tokens in pending) else 0
    for i, tokens in enumerate(pending):
        if tokens == 1 and left > kept:
            feed[i] = 1
            left -= 1
            budget -= 1
    for i, tokens in enumerate(pending):
        if tokens > 1 and left > 0 and (budget > 0 or kept):
            feed[i] = min(tokens, max(budget, 1))
            left -= 1
            budget -= feed[i]
            kept = 0
    return feed
