"""Decisions of the prefill role. Pure: values in, value out."""

from core.errors import BatonError, InvalidRequest, Overloaded
from engine.runner import RunnerLoad
from prefill_worker.config import PrefillConfig


def refuse_prompt(
    num_tokens: int, capacity_tokens: int, load: RunnerLoad, config: PrefillConfig
) -> BatonError | None:
    """Why a prompt cannot be taken now, or None.

    `capacity_tokens` is what this worker's arena and model hold at most. A worker with an empty
    queue takes any prompt that fits: nothing smaller would ever be accepted otherwise.
    """
    if num_tokens < 1:
        return InvalidRequest("the prompt has no tokens")
    if num_tokens > capacity_tokens:
        return InvalidRequest(
            f"the prompt has {num_tokens} tokens; this worker holds {capacity_tokens}"
        )
    if load.queued_tokens and load.queued_tokens + num_tokens > config.max_queued_tokens:
        return Overloaded(f"{load.queued_tokens} prompt tokens are queued already")
    return None
