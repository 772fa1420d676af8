"""How a sequence chooses its tokens and when it ends."""

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why an answer ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one sequence. `temperature` 0 is greedy; `top_k` 0 means no limit.

    The draw for output position p is a function of (`seed`, choice, p) alone, so any worker
    continues the same stream. `max_tokens` counts output tokens of the whole answer, over all
    attempts. `return_logits` sends fp32 logits with every token (tests; not offered over HTTP).
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    return_logits: bool = False

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a checkpoint suggests where a request says nothing; None where it is silent, too.

    generation_config's `do_sample` is not looked at: it is for `generate`, not for an API call.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
