"""Decisions of the decode role. Pure: values in, value out."""

from core.errors import BatonError, InvalidRequest, Overloaded
from decode_worker.config import DecodeConfig


def refuse_sequence(
    context_tokens: int,
    remaining_tokens: int,
    capacity_tokens: int,
    open_legs: int,
    config: DecodeConfig,
) -> BatonError | None:
    """Why a sequence cannot be taken now, or None.

    It must fit alone, at its longest: then preempting the others always lets it finish.
    """
    if context_tokens < 1 or remaining_tokens < 1:
        return InvalidRequest("nothing to generate")
    if context_tokens + remaining_tokens > capacity_tokens:
        return InvalidRequest(
            f"{context_tokens} tokens of context and {remaining_tokens} to come; "
            f"this worker holds {capacity_tokens}"
        )
    if open_legs >= config.max_sequences:
        return Overloaded(f"{open_legs} sequences are held already")
    return None


def pull_headroom_blocks(running: int, awaited_blocks: int) -> int:
    """Free blocks a pull leaves: one for each running sequence to grow into, and those that a
    sequence has waited for, perhaps in the middle of its answer.
    """
    return running + awaited_blocks
